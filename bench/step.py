"""How long is a step, beside plain torch in memory and beside the peers? One paired run.

A Llama of 97.5 M parameters, one sequence of 32 tokens, fp32, AdamW: ``plain`` torch in memory;
``offload`` with 400 MiB and the rest on disk, as a plain loop; ``offload-backward``, the same with
``step_in_backward=True``; ``offload-all`` with room for everything; DeepSpeed with its state in
host memory and on NVMe (bench/peers/). Memory is anonymous memory seen from outside: the peak over
a contestant's life, the peak during its steps, and the latter less what its imports take. Plans
have the disk's rates of the beginning (forecast over measured: "pred."); each turn's bounds, and
its plan's forecast once more ("now"), have those that were measured just before it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from child import SHAPES
from record import append
from rivals import BOUNDS, Row, compete
from traffic import minimum_bytes, minimum_in_backward_bytes

from offload.tiers.probe import probe_machine, remember
from offload.tiers.spec import MIB, Machine, parse_size

BENCH = Path(__file__).parent
DEEPSPEED = BENCH.parent / ".venv-peers" / "deepspeed" / "bin" / "python"
OURS = {  # contestant: its kind in contestant.py, its budget (None: as asked)
    "plain": ("plain", "0"),
    "offload": ("offload", None),
    "offload-backward": ("offload-backward", None),
    "offload-all": ("offload", "4GiB"),
}
PEERS = {"deepspeed-cpu": "cpu", "deepspeed-nvme": "nvme", "deepspeed-nvme-tuned": "nvme-tuned"}
RATIOS = (  # seconds of the first over seconds of the second
    ("offload-all", "plain"),
    ("offload-all", "deepspeed-cpu"),
    ("deepspeed-nvme", "offload"),
    ("deepspeed-nvme", "offload-backward"),
    ("deepspeed-nvme-tuned", "offload"),
    ("deepspeed-nvme-tuned", "offload-backward"),
)


def commands(names: list[str], args: argparse.Namespace, disk: Path) -> dict[str, list[str]]:
    """The command line of each contestant."""
    found = {}
    for name in names:
        if name in OURS:
            kind, budget = OURS[name]
            head = [sys.executable, str(BENCH / "contestant.py"), kind]
        else:
            kind, budget = PEERS[name], None
            head = [str(DEEPSPEED), str(BENCH / "peers" / "deepspeed_child.py"), kind]
        folder = disk / name
        folder.mkdir()
        found[name] = [
            *head, "--shape", args.shape, "--tokens", str(args.tokens),
            "--budget", budget or args.budget, "--disk", str(folder),
        ]  # fmt: skip
    return found


def judge(row: Row, shape: str, budget: str, *, in_backward: bool) -> None:
    """Add to one of our rows what its stats say of it: ratios to bounds, minimum and forecast."""
    stats, numbers = row["stats"], SHAPES[shape]
    forecast = stats["forecast"]
    least = (minimum_in_backward_bytes if in_backward else minimum_bytes)(
        4 * numbers.parameters, 2, parse_size(budget), 4 * numbers.embedding
    )
    moved = row["per_step"]["read_bytes"] + row["per_step"]["write_bytes"]
    row |= {"budget": budget, "minimum_bytes": least, "moved_bytes": moved}
    row["over_minimum"] = moved / least if least else None
    if not forecast:
        return
    for bound in BOUNDS:
        limits = [turn[bound] for turn in row["turns_bounds"]]
        if not all(limits):
            continue
        row[bound] = statistics.median(limits)
        over = [s / limit for s, limit in zip(row["turns_s"], limits, strict=True)]
        row[f"over_{bound}"] = statistics.median(over)
        row[f"over_{bound}_turns"] = over
    row["predicted_over_measured"] = forecast["step_s"] / row["step_s"]
    if all(row["turns_foretold_s"]):
        turns = zip(row["turns_foretold_s"], row["turns_s"], strict=True)
        row["foretold_now_turns"] = [foretold_s / step_s for foretold_s, step_s in turns]
        row["foretold_now"] = statistics.median(row["foretold_now_turns"])
    host = stats["tiers"]["host"]
    row["predicted_over_measured_peak"] = forecast["peak_bytes"] / host["peak_bytes"]


def fresh_machine(disk: Path) -> Machine:
    """Rates of this minute, remembered so that every contestant of ours plans with them."""
    machine = probe_machine(disk)
    remember(disk, machine)
    return machine


def rates_now(disk: Path) -> Callable[[], dict[str, float]]:
    """Measures the disk under a folder when called."""
    return lambda: probe_machine(disk).to_dict()


def show(rows: dict[str, Row]) -> None:
    """Print the table."""
    print(f"{'':21}{'step s':>8}{'peak':>7}{'steps':>7}{'-base':>7}{'x bound':>9}{'x wire':>8}"
          f"{'x least':>9}{'pred.':>7}{'now':>7}   stall, busy s; memory in MiB")  # fmt: skip
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:21}cannot run: {row['error']}")
            continue
        mib = [row["peak_bytes"], row["steps_peak_bytes"],
               row["steps_peak_bytes"] - row["base_bytes"]]  # fmt: skip
        line = f"{name:21}{row['step_s']:8.3f}" + "".join(f"{m / MIB:7.0f}" for m in mib)
        for key, width in (("over_bound_s", 9), ("over_wire_bound_s", 8), ("over_minimum", 9),
                           ("predicted_over_measured", 7), ("foretold_now", 7)):  # fmt: skip
            value = row.get(key)
            line += f"{value:{width}.2f}" if value else " " * (width - 1) + "-"
        spent = {k: v for k, v in row.get("per_step", {}).items() if k.endswith("_s")}
        print(line + "   " + " ".join(f"{k[:-2]} {v:.2f}" for k, v in spent.items()))


def ratios(rows: dict[str, Row]) -> dict[str, float]:
    """Step times of pairs, for the pairs that ran."""
    return {
        f"{a} / {b}": rows[a]["step_s"] / rows[b]["step_s"]
        for a, b in RATIOS
        if "step_s" in rows.get(a, {}) and "step_s" in rows.get(b, {})
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--budget", default="400MiB")
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="counted steps of a turn")
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    before = fresh_machine(args.disk)
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        rivals = commands(args.only, args, Path(folder))
        rows = compete(rivals, args.rounds, args.steps, measure=rates_now(args.disk))
    after = probe_machine(args.disk)
    for name, row in rows.items():
        if "stats" in row:
            budget = OURS[name][1] or args.budget
            judge(row, args.shape, budget, in_backward=name == "offload-backward")
    show(rows)
    found: dict[str, Any] = ratios(rows)
    for pair, ratio in found.items():
        print(f"{pair} = {ratio:.2f}")
    append(
        "step", args.disk, shape=args.shape, tokens=args.tokens, budget=args.budget,
        parameters=SHAPES[args.shape].parameters, rows=rows, ratios=found,
        rates_before=before.to_dict(), rates_after=after.to_dict(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
