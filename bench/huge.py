"""Do huge pages for malloc pay? Steps with and without glibc's tunable, in turns.

What autograd makes (gradients above all) malloc hands out; with a budget its pages go back to the
system between uses, and are faulted in anew. A process cannot ask for huge pages there once it
runs: ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` is read at its start (the ``offload`` command sets
it for itself, see offload/entry.py). Memory: the peak during steps, less what imports take.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from child import SHAPES
from record import append
from rivals import Row, compete

from offload.entry import TUNABLE

KINDS = ("plain", "offload", "offload-backward")
MIB = 1 << 20


def steps_of(args: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """A row for each kind with each malloc."""
    commands = {}
    for kind in args.kinds:
        for pages, tunables in (("4 KiB", ""), ("huge", TUNABLE)):
            disk = folder / f"{kind}-{pages[0]}"
            disk.mkdir()
            commands[f"{kind}, {pages}"] = [
                "/usr/bin/env", f"GLIBC_TUNABLES={tunables}", sys.executable,
                str(Path(__file__).parent / "contestant.py"), kind, "--shape", args.shape,
                "--budget", args.budget, "--disk", str(disk),
            ]  # fmt: skip
    return compete(commands, args.rounds, args.steps, limit_s=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--budget", default="400MiB")
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a turn")
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        rows = steps_of(args, Path(folder))
    found = {}
    for kind in args.kinds:
        usual, huge = rows[f"{kind}, 4 KiB"], rows[f"{kind}, huge"]
        turns = [b / a for a, b in zip(usual["turns_s"], huge["turns_s"], strict=True)]
        found[kind] = {
            "usual_s": usual["step_s"], "huge_s": huge["step_s"],
            "huge_over_usual": statistics.median(turns), "turns": turns,
            "more_bytes": sum(
                sign * (row["steps_peak_bytes"] - row["base_bytes"])
                for sign, row in ((1, huge), (-1, usual))
            ),
        }  # fmt: skip
        print(f"{kind:18}{usual['step_s']:8.3f} s{huge['step_s']:8.3f} s  "
              f"{found[kind]['huge_over_usual']:.3f} x, "
              f"{found[kind]['more_bytes'] / MIB:+.0f} MiB")  # fmt: skip
    append("huge", args.disk, shape=args.shape, budget=args.budget, kinds=found)


if __name__ == "__main__":
    main()
