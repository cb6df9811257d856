"""Does a planned mix of keep, recompute and swap beat recomputing everything, and how near is it
to having all the memory?

A Llama whose activations outweigh its weights, in a plain training loop: ``unconstrained`` keeps
all of them in memory; then ``host_memory`` is a share of the peak that it recorded, with
``activations="auto"``, "recompute" and "swap"; ``checkpointing`` is plain torch with transformers'
own. In turns, in one paired run: this machine's speed changes for seconds at a time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from contestant import ACTIVATIONS
from record import append
from rivals import Row, compete
from step import fresh_machine

from offload.tiers.spec import MIB, format_size

CONTESTANT = Path(__file__).parent / "contestant.py"
FREE = "unconstrained"


def told(name: str, budget: int, args: argparse.Namespace, folder: Path) -> list[str]:
    """A contestant's command line."""
    disk = folder / f"{name}-{budget}"
    disk.mkdir()
    return [
        sys.executable, str(CONTESTANT), "offload" if name == FREE else name,
        "--shape", args.shape, "--tokens", str(args.tokens), "--rows", str(args.rows),
        "--budget", str(budget), "--disk", str(disk),
    ]  # fmt: skip


def peak_bytes(row: Row) -> int:
    """What the host tier held at most."""
    return int(row["stats"]["tiers"]["host"]["peak_bytes"])


def show(rows: dict[str, Row]) -> None:
    """Print the table."""
    free_s = rows[FREE]["step_s"]
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:14} cannot run: {row['error']}")
            continue
        line = f"{name:14} {row['step_s']:.3f} s = {row['step_s'] / free_s:.3f} x"
        if "stats" in row:
            foreseen_s = row["stats"]["forecast"]["step_s"]
            line += f"; foreseen {foreseen_s:.3f} s; peak {peak_bytes(row) / MIB:.0f} MiB; "
            line += " ".join(row["stats"]["activations"]["ways"])
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.4, help="of the recorded peak")
    parser.add_argument("--shape", default="8m")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    machine = fresh_machine(args.disk)
    with tempfile.TemporaryDirectory(dir=args.disk) as name:
        folder = Path(name)
        alone = compete({FREE: told(FREE, 8 << 30, args, folder)}, 1, 1)
        budget = int(args.share * peak_bytes(alone[FREE]))
        commands = {way: told(way, budget, args, folder) for way in (*ACTIVATIONS, "checkpointing")}
        commands[FREE] = told(FREE, 9 << 30, args, folder)
        rows = compete(commands, args.rounds, args.steps)
    show(rows)
    ran = {name: row for name, row in rows.items() if "error" not in row}
    same = len({tuple(row["losses"]) for row in ran.values()}) == 1
    print(f"budget {format_size(budget)} = {args.share} x the recorded peak; same losses: {same}")
    found: dict[str, Any] = {
        "step_s": {name: row["step_s"] for name, row in ran.items()},
        "ratio": {name: row["step_s"] / rows[FREE]["step_s"] for name, row in ran.items()},
        "peak_bytes": {name: peak_bytes(row) for name, row in ran.items() if "stats" in row},
        "auto": rows["auto"].get("stats", {}).get("activations"),
    }
    append(
        "activations", args.disk, share=args.share, budget_bytes=budget, batch=args.rows,
        seq=args.tokens, same_losses=same, **found, rows=rows, rates=machine.to_dict(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
