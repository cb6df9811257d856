"""What noting each step for the report costs: steps with and without it, in turns in one process.

A Llama in less memory than it wants, fp32, AdamW, a plain loop. Steps come in fours, noted, not,
not, noted: a drift of the machine hits both alike. Also: events of a step, seconds for each.
"""

from __future__ import annotations

import argparse
import shutil
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
from offload.tape import Tape
from offload.tiers.probe import probe

WARM_STEPS = 5
EVENTS = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--budget", default="400MiB")
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--fours", type=int, default=12)
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.disk))
    try:
        found = measure(args, folder)
    finally:
        shutil.rmtree(folder)
    print(found)
    append("recording", args.disk, shape=args.shape, tokens=args.tokens, budget=args.budget,
           **found)  # fmt: skip


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Medians of both, and the median over the fours of the one over the other."""
    machine = probe(args.disk)
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
    fours = []
    for _ in range(args.fours):
        spent: dict[bool, list[float]] = {True: [], False: []}
        for noted in (True, False, False, True):
            run.parts.steps.tapes = noted
            ids, began_s = next(source), time.perf_counter()
            step(ids)
            spent[noted].append(time.perf_counter() - began_s)
        fours.append(spent)
    tape = run.parts.steps.tracks[Kind.TRAIN].tape
    assert tape is not None
    events = len(tape.moments) + len(tape.stalls) + len(tape.marks) + len(list(tape.samples()))
    noted_s, plain_s = (statistics.median(s for f in fours for s in f[n]) for n in (True, False))
    ratios = [sum(f[True]) / sum(f[False]) for f in fours]
    began_s = time.perf_counter()
    run.report(folder / "report.json")
    report_s, report_bytes = time.perf_counter() - began_s, (folder / "report.json").stat().st_size
    event_s = seconds_an_event(run)
    run.close()
    return {
        "noted_s": noted_s, "plain_s": plain_s, "ratio": noted_s / plain_s,
        "median_of_fours": statistics.median(ratios),
        "quartiles_of_fours": statistics.quantiles(ratios, n=4),
        "events": events, "event_s": event_s, "events_share": events * event_s / plain_s,
        "report_s": report_s, "report_bytes": report_bytes, "rates": machine.to_dict(),
    }  # fmt: skip


def seconds_an_event(run: Any) -> float:
    """Of the dearer kind: a change of what the tier holds."""
    engine = run.parts.engine
    tape = Tape(engine, time.perf_counter(), None)
    began_s = time.perf_counter()
    for _ in range(EVENTS):
        engine.space.pool.seen(0, 0)
    took_s = time.perf_counter() - began_s
    tape.give_up()
    return took_s / EVENTS


if __name__ == "__main__":
    main()
