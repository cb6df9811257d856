"""How short could this step be? Runs the step that is asked, then solves its trace: schedule.py."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from child import SHAPES, batches
from contestant import managed
from record import append
from schedule import least_s
from step import fresh_machine

import offload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=("offload", "offload-backward"), default="offload")
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--budget", default="400MiB")
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    fresh_machine(args.disk)
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        row = measured(argparse.Namespace(**vars(args) | {"disk": Path(folder)}))
    print(
        f"{args.kind}, {args.budget}: step {row['step_s']:.3f} s; least {row['least_s']:.3f} s "
        f"(step {row['step_s'] / row['least_s']:.2f} x); wire bound {row['wire_bound_s']:.3f} s "
        f"(step {row['step_s'] / row['wire_bound_s']:.2f} x)"
    )
    append("least", args.disk, **{k: v for k, v in vars(args).items() if k != "disk"}, **row)


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Steps of the asked kind: their median time, their bounds, and the least of their trace."""
    held: list[Any] = []
    step = managed(args, args.budget, held)
    ids = batches(SHAPES[args.shape], args.tokens)
    for _ in range(args.steps):
        step(next(ids))
    run = offload.runtime(held[0])
    stats = run.stats()
    trace = run.parts.steps.tracks["train"].trace
    capacity_bytes = run.parts.engine.ledger.capacity_bytes
    machine = run.parts.machine
    run.close()
    return {
        "step_s": stats["step_s"], "bound_s": stats["bound_s"],
        "wire_bound_s": stats["wire_bound_s"], "least_s": least_s(trace, machine, capacity_bytes),
        "forecast_s": stats["forecast"]["step_s"],
    }  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
