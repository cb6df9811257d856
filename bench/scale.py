"""Do time and bytes per parameter stay level as models grow?

Llamas from 25 M to 1.5 B parameters, each with a budget of the same share of its training state
(27%, as 400 MiB are of the 97.5 M model's), one sequence of 32 tokens, the rest on disk; one paired
run. Bar: time per parameter at 1.5 B <= 1.15 x that at 100 M.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from child import SHAPES
from record import append
from rivals import Row, compete
from step import fresh_machine, judge, rates_now, show

SHORT = ["25m", "100m", "400m"]
SHARE = (400 << 20) / (4 * 4 * SHAPES["100m"].parameters)


def budget_bytes(shape: str) -> int:
    """The same share of every model's weights, gradients and moments."""
    return int(SHARE * 4 * 4 * SHAPES[shape].parameters)


def steps_of(args: argparse.Namespace, folder: Path) -> dict[str, Row]:
    """A row for each size."""
    commands = {}
    for shape in args.shapes:
        disk = folder / shape
        disk.mkdir()
        commands[shape] = [
            sys.executable, str(Path(__file__).parent / "contestant.py"), args.kind,
            "--shape", shape, "--tokens", str(args.tokens),
            "--budget", str(budget_bytes(shape)), "--disk", str(disk),
        ]  # fmt: skip
    measure = rates_now(args.disk)
    rows = compete(commands, args.rounds, args.steps, limit_s=250, measure=measure)
    for shape, row in rows.items():
        if "stats" in row:
            in_backward = args.kind == "offload-backward"
            judge(row, shape, str(budget_bytes(shape)), in_backward=in_backward)
            count = SHAPES[shape].parameters
            row["ns_per_parameter"] = row["step_s"] * 1e9 / count
            row["moved_bytes_per_parameter"] = row["moved_bytes"] / count
            row["disk_bytes_per_parameter"] = row["stats"]["tiers"]["disk"]["used_bytes"] / count
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=SHORT)
    parser.add_argument("--kind", choices=("offload", "offload-backward"), default="offload")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    machine = fresh_machine(args.disk)
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        rows = steps_of(args, Path(folder))
    show(rows)
    for shape, row in rows.items():
        if "ns_per_parameter" in row:
            each = [row[f"{k}_bytes_per_parameter"] for k in ("disk", "moved")]
            print(f"{shape:6}{row['ns_per_parameter']:7.2f} ns, {each[0]:.1f} B on disk, "
                  f"{each[1]:.1f} B moved, per parameter")  # fmt: skip
    append(
        "scale", args.disk, rows=rows, kind=args.kind, tokens=args.tokens,
        rates_before=machine.to_dict(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
