"""Long sequences: where activations outweigh weights. Checkpointing and ``save_on_cpu`` unwrapped,
checkpointing wrapped, and our own tiering: all run again, all swapped to the host, or as chosen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from gpu.common import (
    arguments,
    cap_bytes,
    checkpointed,
    llama,
    measured,
    placed,
    shape_of,
    timed,
    tokens_of,
)
from gpu.runner import line

import offload

TIERED = {"ours-recompute": "recompute", "ours-swap": "swap", "ours-auto": "auto"}


def main() -> None:
    args = arguments("checkpointing", "save_on_cpu", "ours-checkpointing", *TIERED)
    args.checkpointing = args.way.endswith("checkpointing")
    cap, shape = cap_bytes(args), shape_of(args)
    place = "cpu" if args.emulated else "cuda"
    model, ids = llama(shape), tokens_of(args, shape.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    saving: Callable[[], Any] = nullcontext
    if args.checkpointing:
        checkpointed(model)
    if args.way.startswith("ours"):
        offload.wrap(
            model,
            optimizer,
            compute_dtype=torch.bfloat16,
            activations=TIERED.get(args.way, "keep"),
            **placed(args, cap),
        )
    else:
        model, ids = model.to(place), ids.to(place)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        if args.way == "save_on_cpu":

            def saving() -> Any:
                return torch.autograd.graph.save_on_cpu(pin_memory=place == "cuda")

    def step() -> Any:
        with saving(), torch.autocast(place, torch.bfloat16, enabled=args.way[:4] != "ours"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    row = measured(args, shape, *timed(step, 4, 2)) | {"way": args.way}
    if args.way.startswith("ours"):
        found = offload.runtime(model).stats()["activations"]
        row |= {name: found[name] for name in ("ways", "swapped_bytes", "disk_bytes")}
    line(row)


if __name__ == "__main__":
    main()
