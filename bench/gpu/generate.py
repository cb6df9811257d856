"""Generation with a model of OPT-30B's shape under a cap: one row, many rows, int4, a long history.

Random weights: the time of dense products does not depend on them. As many layers as the host
holds beside nothing else; figures are of the layers that there are, which every row says.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from gpu.common import (
    arguments,
    bare,
    cap_bytes,
    fill,
    host_bytes,
    peaks,
    placed,
    plain_stats,
    write_reports,
)
from gpu.runner import line
from torch import nn

import offload
from offload.places import BlockPlan

LAYERS = 48
INT4_LAYERS = 12  # quantising takes the CPU some seconds a layer
SHORT_LAYERS = 12
HOST_SHARE = 0.55
NEW, SHORT_NEW, PROMPT = 16, 10, 32
KV_LAYERS, KV_PROMPT, KV_PLAN = 12, 1024, BlockPlan(8, 4)  # 11 GB of keys and values


def opt_config(args: argparse.Namespace, layers: int) -> Any:
    """OPT-30B's dimensions; tiny where emulated."""
    from transformers import OPTConfig

    hidden, inner, heads, vocabulary = (7168, 28672, 56, 50272)
    if args.emulated:
        hidden, inner, heads, vocabulary, layers = 128, 256, 2, 192, 3
    layer_bytes = 2 * (4 * hidden**2 + 2 * hidden * inner)
    room = HOST_SHARE * host_bytes(args)
    layers = min(layers, SHORT_LAYERS if args.short else layers, int(room // layer_bytes))
    return OPTConfig(
        vocab_size=vocabulary, hidden_size=hidden, ffn_dim=inner, num_hidden_layers=layers,
        num_attention_heads=heads, word_embed_proj_dim=hidden, max_position_embeddings=2048,
        eos_token_id=None, pad_token_id=1, bos_token_id=None,
    )  # fmt: skip


def opt(args: argparse.Namespace, layers: int) -> Any:
    """OPT of such dimensions, in bf16."""
    from transformers import OPTForCausalLM

    config = opt_config(args, layers)
    return fill(bare(lambda: OPTForCausalLM(config), torch.bfloat16)).eval()


def weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


class Clock:
    """A logits processor that notes when each token is there."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.at_s.append(time.perf_counter())
        return scores


def one_row(args: argparse.Namespace, model: Any, place: str) -> dict[str, Any]:
    """``model.generate`` as a user would call it; seconds of a token after the first few."""
    ids = torch.arange(2, 2 + PROMPT)[None].to(place)
    clock, new = Clock(), 8 if args.emulated else SHORT_NEW if args.short else NEW
    with torch.no_grad():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, logits_processor=[clock],
        )  # fmt: skip
    gaps = [b - a for a, b in zip(clock.at_s[4:], clock.at_s[5:], strict=False)]
    token_s = statistics.median(gaps)
    return {
        "way": args.way, "layers": model.config.num_hidden_layers, "token_s": token_s,
        "weight_bytes": weight_bytes(model), "weights_per_s": weight_bytes(model) / token_s,
        **peaks(), "says": f"{token_s:.3f} s a token",
    }  # fmt: skip


def many_rows(args: argparse.Namespace, model: Any, plan: BlockPlan, prompt: int,
              kv_memory: str | None = None, attention: str = "auto") -> dict[str, Any]:  # fmt: skip
    """``runtime.generate``: all rows of the plan side by side."""
    run, steps, rows = offload.runtime(model), list[Any](), plan.rows
    generator = torch.Generator().manual_seed(1)
    vocabulary = int(model.config.vocab_size)
    prompts = torch.randint(3, vocabulary, (rows, prompt), generator=generator)
    began_s = time.perf_counter()
    run.generate(
        list(prompts), 8 if args.emulated else NEW, kv_memory=kv_memory,
        attention=attention, plan=plan, on_step=steps.append,
    )  # fmt: skip
    took_s, new = time.perf_counter() - began_s, sum(s.new_tokens for s in steps)
    later = [s for s in steps[4:] if not s.prompt_tokens]
    step_s = statistics.median(s.step_s for s in later)
    return {
        "way": args.way, "layers": model.config.num_hidden_layers, "rows": rows,
        "whole_tokens_per_s": new / took_s, "step_s": step_s, "tokens_per_s": rows / step_s,
        "kv": run.stats()["kv"], **peaks(), "says": f"{rows / step_s:.1f} tokens/s",
    }  # fmt: skip


def wrapped(args: argparse.Namespace, cap: int | None, layers: int, **how: Any) -> Any:
    """The model over host and device."""
    model = opt(args, layers)
    offload.wrap(model, **placed(args, cap), **how)
    return model


def kv_beyond(args: argparse.Namespace, cap: int | None) -> dict[str, Any]:
    """Keys and values of all rows larger than the cap, in host memory, some on disk.

    Attention to them on the host ("kv-host"), after a copy ("kv-device"), or as measured ("kv").
    Activations of prompts are on the device, so a few rows at a time have their turn.
    """
    attention = args.way.removeprefix("kv").removeprefix("-") or "auto"
    plan, prompt = (BlockPlan(1, 2), 16) if args.emulated else (KV_PLAN, KV_PROMPT)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        where = placed(args, cap) | {"disk": folder}
        model = opt(args, KV_LAYERS)
        offload.wrap(model, **where)
        found = many_rows(args, model, plan, prompt, "8MiB" if args.emulated else "8GiB", attention)
        offload.runtime(model).close()
    return found


def flexllmgen() -> None:
    """Said as it is: its import, or its error."""
    import flexllmgen

    raise RuntimeError(f"{flexllmgen.__name__} can be imported: run its own bench with the shape")


def main() -> None:
    args = arguments(
        "ours", "accelerate", "many", "flexllmgen", "int4", "kv", "kv-host", "kv-device"
    )
    if args.way == "flexllmgen":
        flexllmgen()
    cap = cap_bytes(args)
    if args.way == "accelerate":
        from accelerate import cpu_offload

        model = opt(args, LAYERS)
        cpu_offload(model, execution_device=torch.device("cuda", 0))
        line(one_row(args, model, "cuda"))
    elif args.way == "ours":
        model = wrapped(args, cap, LAYERS)
        line(one_row(args, model, "cpu"))
        run = offload.runtime(model)
        line({"stats": plain_stats(run), "reports": write_reports(run, args, "generate")})
    elif args.way == "many":
        model = wrapped(args, cap, LAYERS)
        for rows in (2,) if args.emulated else (8, 64):
            line(many_rows(args, model, BlockPlan(rows), PROMPT))
    elif args.way == "int4":
        for dtype in (None, "int4"):
            model = wrapped(args, cap, INT4_LAYERS, weight_dtype=dtype)
            line(one_row(args, model, "cpu") | {"weight_dtype": dtype})
            offload.runtime(model).close()
            del model
    else:
        line(kv_beyond(args, cap))


if __name__ == "__main__":
    main()
