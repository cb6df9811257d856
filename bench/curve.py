"""Does time fall with memory? Step time and its bound with 0 to 100% of the training state in RAM.

The state is weights, gradients and two moments. A budget is the least that runs at all (staging,
activations, the largest moment) plus the asked share of the state. One paired run, plans and bounds
as in bench/step.py. Bars: each step <= 1.15 x its bound_s, and less with more memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from child import SHAPES
from record import append
from rivals import compete
from step import fresh_machine, judge, rates_now, show

CONTESTANT = Path(__file__).parent / "contestant.py"


def told(kind: str, args: argparse.Namespace, folder: Path, budget: int = 0) -> list[str]:
    """A contestant's command line."""
    folder.mkdir()
    return [
        sys.executable, str(CONTESTANT), kind, "--shape", args.shape, "--tokens", str(args.tokens),
        "--budget", str(budget), "--disk", str(folder),
    ]  # fmt: skip


def least_bytes(args: argparse.Namespace, folder: Path) -> int:
    """The smallest budget with which this model steps."""
    done = subprocess.run(told("least", args, folder), capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1])["least_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--percent", type=int, nargs="+", default=[0, 25, 50, 75, 100])
    parser.add_argument("--kind", choices=("offload", "offload-backward"), default="offload")
    parser.add_argument("--least", type=int, help="smallest budget in bytes; else it is sought")
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    machine = fresh_machine(args.disk)
    state_bytes = 4 * 4 * SHAPES[args.shape].parameters
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        least = args.least or least_bytes(args, Path(folder, "least"))
        budgets = {f"{p}%": least + p * state_bytes // 100 for p in args.percent}
        commands = {k: told(args.kind, args, Path(folder, k), b) for k, b in budgets.items()}
        rows = compete(commands, args.rounds, args.steps, measure=rates_now(args.disk))
    for name, row in rows.items():
        if "stats" in row:
            in_backward = args.kind == "offload-backward"
            judge(row, args.shape, str(budgets[name]), in_backward=in_backward)
    show(rows)
    times = [row["step_s"] for row in rows.values() if "step_s" in row]
    falls = all(more < less for less, more in itertools.pairwise(times))
    print(f"least budget {least / 2**20:.0f} MiB; time falls with memory: {falls}")
    append(
        "curve", args.disk, shape=args.shape, tokens=args.tokens, kind=args.kind, rows=rows,
        least_bytes=least, state_bytes=state_bytes, falls=falls, rates_before=machine.to_dict(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
