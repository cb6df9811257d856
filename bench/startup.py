"""Do huge pages for malloc and threads that spin for a shorter time pay? In turns, with each.

Malloc's freed pages go back to the system within a budget and are faulted in anew; the ``offload``
command asks for huge ones at its start (offload/entry.py). OpenMP's threads spin for a shorter time
while chunks move (offload/spins.py) unless the environment says how long: 300,000 turns are its
default. Memory: the peak during steps, less what imports take.
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
LONG = {"GOMP_SPINCOUNT": "300000"}
WAYS = {
    "neither": {"GLIBC_TUNABLES": "", **LONG},
    "huge pages": {"GLIBC_TUNABLES": TUNABLE, **LONG},
    "short spins": {"GLIBC_TUNABLES": ""},
    "both": {"GLIBC_TUNABLES": TUNABLE},
}
MIB = 1 << 20


def steps_of(args: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """A row for each kind in each way."""
    commands = {}
    for kind in args.kinds:
        for way, said in WAYS.items():
            disk = folder / f"{kind}-{way}"
            disk.mkdir()
            commands[f"{kind}, {way}"] = [
                "/usr/bin/env", "-u", "GOMP_SPINCOUNT",
                *(f"{name}={value}" for name, value in said.items()), sys.executable,
                str(Path(__file__).parent / "contestant.py"), kind, "--shape", args.shape,
                "--budget", args.budget, "--disk", str(disk),
            ]  # fmt: skip
    return compete(commands, args.rounds, args.steps, limit_s=150)


def judged(rows: dict[str, Row], kind: str) -> dict[str, dict[str, object]]:
    """Each way beside the first."""
    usual, found = rows[f"{kind}, {next(iter(WAYS))}"], {}
    for way in WAYS:
        row = rows[f"{kind}, {way}"]
        turns = [b / a for a, b in zip(usual["turns_s"], row["turns_s"], strict=True)]
        held = [r["steps_peak_bytes"] - r["base_bytes"] for r in (row, usual)]
        found[way] = {
            "step_s": row["step_s"], "over_usual": statistics.median(turns), "turns": turns,
            "more_bytes": held[0] - held[1],
        }  # fmt: skip
    return found


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
    found = {kind: judged(rows, kind) for kind in args.kinds}
    for kind, ways in found.items():
        for way, row in ways.items():
            print(f"{kind:18}{way:13}{row['step_s']:8.3f} s  {row['over_usual']:.3f} x, "
                  f"{int(str(row['more_bytes'])) / MIB:+.0f} MiB")  # fmt: skip
    append("startup", args.disk, shape=args.shape, budget=args.budget, kinds=found)


if __name__ == "__main__":
    main()
