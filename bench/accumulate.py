"""What does accumulation move? Bytes of weights, gradients and state in a step of 1 and of 8.

A Llama on disk but for a budget, micro-batches in the plain loop and by ``runtime.accumulate``.
Activations of 8 exist at once there, so two comparisons with one micro-batch are made: with the
same *room*, what the budget leaves for chunks when activations and gradients in flight are at
their peak, and with the same *budget*. The bar is for weights read at the same room.
Steps that are counted follow a plan that is not made anew any more; medians.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from child import SHAPES, batches, build
from record import append

import offload
from offload.config import Tuning
from offload.run import Runtime
from offload.tiers.lane import ThreadLane
from offload.tiers.layout import choose_chunk_bytes
from offload.tiers.spec import MIB, format_size, parse_size

WARM_STEPS = 9  # one recorded, eight replayed; the plan is final after the seventh
PLENTY = 64 << 30
COPIES = 4  # weight, gradient, two moments
BAR = 1.1
Row = dict[str, Any]


@dataclass
class Run:
    """One managed model and its loop."""

    args: argparse.Namespace
    count: int
    order: str
    budget_bytes: int
    seconds: list[float] = field(default_factory=list)
    moved: list[Counter[str]] = field(default_factory=list)

    def live(self, folder: Path, warm: int, steps: int) -> Row:
        """Take the steps; what was moved in the later ones."""
        shape, room_bytes = SHAPES[self.args.shape], parse_size(self.args.room)
        tuning = Tuning(chunk_bytes=choose_chunk_bytes(room_bytes, COPIES))  # the same for all
        told = {"host_memory": self.budget_bytes, "disk": folder, "tuning": tuning}
        model = offload.init(lambda: build(shape), **told)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        offload.wrap(model, optimizer, tuning=tuning)
        source = batches(shape, self.args.tokens)
        run = offload.runtime(model)
        for i in range(warm + steps):
            self._step(run, optimizer, list(islice(source, self.count)))
            moved = _moved(run)
            if i >= warm:
                self.moved.append(moved)
        row = self._row(run, steps)
        run.close()
        return row

    def _step(self, run: Runtime, optimizer: Any, micro_batches: list[torch.Tensor]) -> None:
        began_s = time.perf_counter()
        if self.order == "vertical":
            run.accumulate(micro_batches, _loss)
        else:
            for ids in micro_batches:
                _loss(run.model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - began_s)

    def _row(self, run: Runtime, steps: int) -> Row:
        stats = run.stats()
        host, forecast = stats["tiers"]["host"], stats["forecast"] or {}
        keys = sorted({key for moved in self.moved for key in moved})
        plan = run.plan
        return {
            "order": self.order, "micro_batches": self.count, "budget_bytes": self.budget_bytes,
            "other_bytes": host["peak_other_bytes"],
            "room_bytes": self.budget_bytes - host["peak_other_bytes"],
            "step_s": statistics.median(self.seconds[-steps:]) if steps else None,
            "bytes": {k: statistics.median(m[k] for m in self.moved) for k in keys},
            "forecast": {k: forecast.get(k) for k in ("step_s", "read_bytes", "write_bytes")},
            "reserve_bytes": plan.reserve_bytes if plan else None,
            "counters": stats["counters"],
        }  # fmt: skip


def _loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _moved(run: Runtime) -> Counter[str]:
    """Bytes that lanes moved since the last call, by lane and what they are."""
    space, families = run.parts.engine.space, run.parts.binding.families
    kinds = dict.fromkeys(range(len(space.chunks)), "state")
    for family in families:
        kinds |= dict.fromkeys(family.weights.chunk_ids, "weight")
        kinds |= dict.fromkeys(family.grads.chunk_ids, "gradient") if family.grads else {}
    moved: Counter[str] = Counter()
    for name, lane in space.lanes.items():
        assert isinstance(lane, ThreadLane)
        while lane.spans:
            chunk = lane.spans.popleft()[0]
            moved[f"{kinds[chunk]} {name}"] += space.chunks[chunk].size_bytes
    return moved


def compare(rows: dict[str, Row]) -> dict[str, float]:
    """Bytes of the others over those of one micro-batch: of weights, and of everything."""
    one, found = rows["one"]["bytes"], {}
    for name, row in rows.items():
        both = [b["weight read"] + b["weight write"] for b in (row["bytes"], one)]
        found[f"{name} weights read"] = row["bytes"]["weight read"] / one["weight read"]
        found[f"{name} weights read and written"] = both[0] / both[1]
        found[f"{name} all"] = sum(row["bytes"].values()) / sum(one.values())
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """One row a run, by name."""
    disk = folder / "spill"

    def live(order: str, count: int, budget_bytes: int, warm: int, steps: int) -> Row:
        disk.mkdir()
        row = Run(args, count, order, budget_bytes).live(disk, warm, steps)
        shutil.rmtree(disk)
        return row

    room_bytes, rows = parse_size(args.room), {}
    for name in args.runs:
        order, count = ("plain", 1) if name == "one" else (name.split()[0], args.count)
        budget_bytes = room_bytes
        if "budget" not in name:
            budget_bytes += live(order, count, PLENTY, 1, 0)["other_bytes"]
        elif "one" in rows:
            budget_bytes = rows["one"]["budget_bytes"]
        rows[name] = live(order, count, budget_bytes, WARM_STEPS, args.steps)
        show(name, rows[name])
    return rows


def show(name: str, row: Row) -> None:
    """One line for people."""
    kinds = ", ".join(f"{k} {v / MIB:.0f}" for k, v in row["bytes"].items())
    print(f"{name}: budget {format_size(row['budget_bytes'])}, room "
          f"{format_size(row['room_bytes'])}, reserve {format_size(row['reserve_bytes'] or 0)}, "
          f"{row['step_s']:.2f} s; MiB: {kinds}; forecast {row['forecast']}; {row['counters']}",
          flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("one", "vertical", "vertical same budget", "plain", "plain same budget")
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--room", default="400MiB", help="for chunks, beside activations")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--count", type=int, default=8, help="micro-batches")
    parser.add_argument("--runs", nargs="*", choices=names, default=["one", "vertical"])
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        rows = measure(args, Path(folder))
    ratios = compare(rows) if "one" in rows else {}
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.3f} x one micro-batch's (bar for weights read: {BAR})")
    append("accumulate", args.disk, rows=rows, ratios=ratios, shape=args.shape, tokens=args.tokens)


if __name__ == "__main__":
    main()
