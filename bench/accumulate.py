"""What does accumulation cost? Bytes and time of a step of 1, 2, 4, 8 micro-batches, both orders.

A Llama-like stack of linear layers on disk but for a small budget; the plain loop against
``runtime.accumulate``, steps interleaved. Medians; appends JSON lines to results/accumulate.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload

WIDTH, LAYERS, ROWS = 1024, 24, 32
BUDGET = "160MiB"
ORDERS = ("plain", "vertical")


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Some loss."""
    loss: Tensor = model(batch).square().mean()
    return loss


def build(disk: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A managed model of 25 million weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(m for _ in range(LAYERS) for m in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()))
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    offload.wrap(model, optimizer, host_memory=BUDGET, disk=disk)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, order: str, count: int) -> float:
    """Seconds of one optimizer step."""
    batches = [torch.randn(ROWS, WIDTH) for _ in range(count)]
    start_s = time.perf_counter()
    if order == "vertical":
        offload.runtime(model).accumulate(batches, loss_of)
    else:
        for batch in batches:
            loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start_s


def measure(disk: Path, count: int, steps: int) -> list[dict[str, Any]]:
    """Both orders, step by step in turn; the first three steps of each are not counted."""
    runs = {order: build(disk / f"{order}{count}") for order in ORDERS}
    seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
    for _ in range(steps + 3):
        for order, (model, optimizer) in runs.items():
            seconds[order].append(step(model, optimizer, order, count))
    lines = []
    for order, (model, _) in runs.items():
        stats = offload.runtime(model).stats()
        lines.append({
            "bench": "accumulate", "order": order, "micro_batches": count,
            "step_s": statistics.median(seconds[order][3:]), "step_bytes": stats["step_bytes"],
            "bound_s": stats["bound_s"], "budget": BUDGET, "parameters": LAYERS * WIDTH * WIDTH,
            "torch": torch.__version__, "python": platform.python_version(),
            "command": " ".join(["python", *sys.argv[:1]]),
        })  # fmt: skip
        offload.runtime(model).close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    print(f"{'micro-batches':>13}{'order':>10}{'step s':>9}{'read MiB':>10}{'write MiB':>11}")
    for count in (1, 2, 4, 8):
        with tempfile.TemporaryDirectory(dir=args.disk) as folder:
            lines = measure(Path(folder), count, args.steps)
        for line in lines:
            read, write = (line["step_bytes"][k] / 2**20 for k in ("read", "write"))
            print(f"{count:13}{line['order']:>10}{line['step_s']:9.3f}{read:10.0f}{write:11.0f}")
            with (Path(__file__).parent / "results" / "accumulate.jsonl").open("a") as out:
                out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
