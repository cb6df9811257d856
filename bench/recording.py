"""What noting each step for the report costs: steps with and without it, in turns in one process.

A Llama in less memory than it wants, fp32, AdamW, a plain loop. Steps come in threes, in random
order: noted, plain, and plain once more as a control, which shows what chance alone does. Also:
events of a step and seconds for each.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from child import SHAPES, batches, build
from contestant import stepper
from record import append

import offload
from offload.config import Tuning
from offload.steps import Kind
from offload.tape import Tape, meters_of
from offload.tiers.probe import probe_machine

WARM_STEPS = 5
WAYS = ("noted", "plain", "control")
EVENTS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--budget", default="400MiB")
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--threes", type=int, default=16)
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        found = measure(args, Path(folder))
    print(found)
    append("recording", args.disk, shape=args.shape, tokens=args.tokens, budget=args.budget,
           **found)  # fmt: skip


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians of all ways, and the ratios of noted and control steps to plain ones."""
    machine = probe_machine(args.disk)
    model = offload.init(
        lambda: build(SHAPES[args.shape]), host_memory=args.budget, disk=folder,
        tuning=Tuning(machine=machine),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    offload.wrap(model, optimizer, tuning=Tuning(machine=machine))
    run, step = offload.runtime(model), stepper(model, optimizer)
    source = batches(SHAPES[args.shape], args.tokens)
    for _ in range(WARM_STEPS):
        step(next(source))
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in (w for _ in range(args.threes) for w in random.sample(WAYS, len(WAYS))):
        run.parts.steps.tapes = way == "noted"
        ids, began_s = next(source), time.perf_counter()
        step(ids)
        spent[way].append(time.perf_counter() - began_s)
    run.parts.steps.tapes = True
    tape = run.parts.steps.tracks[Kind.TRAIN].tape
    assert tape is not None
    events = len(tape.moments) + len(tape.stalls) + len(tape.marks) + len(list(tape.samples()))
    median_s = {way: statistics.median(spent[way]) for way in WAYS}
    began_s = time.perf_counter()
    run.report(folder / "report.json")
    report_s, report_bytes = time.perf_counter() - began_s, (folder / "report.json").stat().st_size
    event_s = seconds_an_event(run)
    run.close()
    return {
        "step_s": median_s, "least_s": {way: min(spent[way]) for way in WAYS},
        "noted": against(spent["noted"], spent["plain"]),
        "control": against(spent["control"], spent["plain"]),
        "events": events, "event_s": event_s, "events_share": events * event_s / median_s["plain"],
        "report_s": report_s, "report_bytes": report_bytes, "rates": machine.to_dict(),
    }  # fmt: skip


def against(ones: list[float], others: list[float]) -> dict[str, Any]:
    """Of the ratios within each three: median and quartiles."""
    ratios = [a / b for a, b in zip(ones, others, strict=True)]
    return {"median": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)}


def seconds_an_event(run: Any) -> float:
    """Of the dearer kind: a change of what the tier holds."""
    engine = run.parts.engine
    tape = Tape(engine, time.perf_counter(), meters_of(engine), None)
    began_s = time.perf_counter()
    for _ in range(EVENTS):
        engine.space.pool.seen(0, 0)
    took_s = time.perf_counter() - began_s
    tape.give_up()
    return took_s / EVENTS


if __name__ == "__main__":
    main()
