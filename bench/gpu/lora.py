"""LoRA on a frozen bf16 base of three times the device memory; unwrapped, uncapped."""

from __future__ import annotations

from typing import Any

import torch
from gpu.common import (
    arguments,
    cap_bytes,
    checkpointed,
    llama,
    measured,
    placed,
    plain_stats,
    shape_of,
    stepper,
    steps_of,
    timed,
    tokens_of,
)
from gpu.runner import line
from gpu.shapes import GB, LORA

import offload


def main() -> None:
    args = arguments("ours", "plain")
    shape = shape_of(args) if args.emulated else LORA
    weights = 2 * shape.parameters
    args.cap = f"{weights / 3 / GB:.2f}" if args.way == "ours" else "none"
    cap = cap_bytes(args)
    from peft import LoraConfig, get_peft_model

    base: Any = llama(shape, torch.bfloat16)
    told = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, told)
    if args.checkpointing:
        checkpointed(model)
    place = "cpu" if args.emulated else "cuda"
    ids = tokens_of(args, shape.vocabulary)
    if args.way == "plain":
        model, ids = model.to(place), ids.to(place)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if args.way == "ours":
        offload.wrap(model, optimizer, compute_dtype=torch.bfloat16, **placed(args, cap))

    row = measured(args, shape, *timed(stepper(model, optimizer, ids), *steps_of(args)))
    # Gradients of weights are not computed: 4 FLOPs for each parameter and token, not 6.
    row |= {"way": args.way, "shape": "lora", "tflops": row["tflops"] * 4 / 6}
    if args.way == "ours":
        row["stats"] = plain_stats(offload.runtime(model))
    line(row)


if __name__ == "__main__":
    main()
