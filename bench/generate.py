"""How fast does a model larger than its memory generate, and how fast do others?

Each row is a contestant (bench/generator.py) in a process and memory cgroup of its own (root),
loading included, one after the other, page cache cold at its start. Greedy decode at batch 1 of a
Llama with random weights, made here. Appends a JSON line to bench/results/generate.jsonl.
``--fits`` instead: what wrapping costs where everything fits, both models taking turns.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
from checkpoint import SHAPES, chill, make, weight_bytes
from child import anonymous_bytes
from memory import cgroup

from offload.tiers.spec import format_size, parse_size

PEER = Path(__file__).parent.parent / ".venv-peers" / "accelerate" / "bin" / "python"
Row = dict[str, Any]


@dataclass(frozen=True)
class Contest:
    """A contestant's name, memory limit (None: the machine's) and budget, if it takes one."""

    kind: str
    limit: str | None = None
    budget: str | None = None
    peer: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} {self.limit or 'no limit'}"


CONTESTS = {
    "tiny": [Contest("plain"), Contest("offload", "1GiB", "17MiB")],
    "364m": [
        Contest("plain"),
        Contest("plain", "800MiB"),
        Contest("offload", "800MiB", "430MiB"),
        Contest("accelerate-disk", "800MiB", peer=True),
        Contest("accelerate-disk", "1200MiB", peer=True),
        Contest("accelerate-cpu", "1200MiB", peer=True),
        Contest("accelerate-cpu", peer=True),
    ],
    "3b": [Contest("offload", "2GiB", "1500MiB")],
}


def run(contest: Contest, args: argparse.Namespace, checkpoint: Path) -> Row:
    """One contestant from start to end; what it said, how it ended, its peak memory."""
    python = str(PEER) if contest.peer else sys.executable
    command = [
        python, str(Path(__file__).parent / "generator.py"), contest.kind,
        "--checkpoint", str(checkpoint), "--disk", str(args.disk),
        "--prompt", str(args.prompt), "--tokens", str(args.tokens),
        *(["--budget", contest.budget] if contest.budget else []),
    ]  # fmt: skip
    chill(checkpoint)
    procs, group = cgroup(parse_size(contest.limit) if contest.limit else 1 << 40)
    row: Row = {"kind": contest.kind, "limit": contest.limit, "budget": contest.budget}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=said, stderr=errors,
            preexec_fn=lambda: (group / procs).write_text(str(os.getpid())),
        )  # fmt: skip
        row["peak_bytes"] = _watch(process, args.limit_s)
        said.seek(0)
        for line in said:
            row |= json.loads(line) if line.startswith("{") else {}
        errors.seek(0)
        if process.returncode or "token_s" not in row:
            row["error"] = _why(process.returncode, errors.read(), args.limit_s)
    _remove(group)
    return row


def _watch(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """Wait for its end, or end it; its peak of anonymous bytes."""
    peak_bytes, ends_s = 0, time.monotonic() + limit_s
    while process.poll() is None:
        peak_bytes = max(peak_bytes, anonymous_bytes(process.pid))
        if time.monotonic() > ends_s:
            process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    return peak_bytes


def _why(code: int, errors: str, limit_s: float) -> str:
    if code == -signal.SIGKILL:
        return "killed: out of memory"
    if code == -signal.SIGTERM:
        return f"stopped: not done in {limit_s:.0f} s"
    lines = [x.strip() for x in errors.splitlines() if "Error" in x]
    return lines[-1][:200] if lines else f"ended with exit code {code}"


def _remove(group: Path) -> None:
    for _ in range(50):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


def least_bytes(checkpoint: Path, embedding_bytes: int, budget: str) -> int:
    """Least bytes read per token: all that is not looked up by row and does not stay.

    That nothing else takes memory makes it a limit that cannot be reached.
    """
    return max(weight_bytes(checkpoint) - embedding_bytes - parse_size(budget), 0)


def finish(row: Row, checkpoint: Path, embedding_bytes: int) -> Row:
    """Add the ratios, and keep of the stats what they came from."""
    stats = row.pop("stats", None)
    if stats and stats["bound_s"]:
        read_bytes = stats["step_bytes"]["read"]
        row |= {k: stats[k] for k in ("bound_s", "forecast", "step_s", "temporaries_bytes")}
        row |= {"read_bytes": read_bytes, "stall_s": stats["stall_s"], "forms": stats["forms"]}
        row["over_bound"] = row["token_s"] / stats["bound_s"]
        least = least_bytes(checkpoint, embedding_bytes, row["budget"])
        row["over_least_bytes"] = read_bytes / least if least else None
    return row


def table(rows: list[Row]) -> str:
    """The rows for people."""
    lines = ["| contestant | limit | s a token | first token | load | peak anonymous | x bound |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        start = f"| {row['kind']} | {row['limit'] or 'none'} "
        if "error" in row:
            lines.append(f"{start}| {row['error']} | | | {format_size(row['peak_bytes'])} | |")
            continue
        over = f"{row['over_bound']:.2f}" if "over_bound" in row else ""
        lines.append(
            f"{start}| {row['token_s']:.3f} | {row['first_s']:.2f} s | {row['load_s']:.1f} s "
            f"| {format_size(row['peak_bytes'])} | {over} |"
        )
    return "\n".join(lines)


def fits(args: argparse.Namespace, checkpoint: Path) -> Row:
    """Wrapped and plain in one process, in turns of a few tokens each."""
    import torch
    from generator import greedy, measure
    from transformers import AutoModelForCausalLM

    import offload

    torch.set_num_threads(os.cpu_count() or 1)
    models = {
        "plain": AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto"),
        "wrapped": offload.from_pretrained(
            checkpoint, host_memory="6GiB", disk=args.disk / "spill"
        ),
    }
    ids = torch.ones((1, args.prompt), dtype=torch.int64)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(args.rounds + 1):
        for name in sorted(models, reverse=bool(turn % 2)):
            seen = measure(greedy(models[name]), ids, args.tokens)
            if turn:  # in the first turn the wrapped one records
                times[name].append(statistics.median(seen["each_s"]))
    pairs = [w / p for p, w in zip(times["plain"], times["wrapped"], strict=True)]
    medians = {f"{name}_s": statistics.median(t) for name, t in times.items()}
    return {"fits": medians, "ratios": pairs, "ratio": statistics.median(pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="364m", choices=SHAPES)
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=[], help="names as in the table: 'plain'")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--limit-s", type=float, default=600)
    parser.add_argument("--fits", action="store_true")
    parser.add_argument("--prepare", action="store_true", help="write the checkpoint, no more")
    args = parser.parse_args()
    checkpoint = make(args.disk, args.shape)
    if args.prepare:
        return
    if args.fits:
        result = fits(args, checkpoint)
        print(json.dumps(result, indent=1))
        record.append("generate", args.disk, shape=args.shape, **result)
        return
    config = SHAPES[args.shape]()
    embedding_bytes = config.vocab_size * config.hidden_size * config.dtype.itemsize
    chosen = [c for c in CONTESTS[args.shape] if not args.only or c.name in args.only]
    rows = [finish(run(c, args, checkpoint), checkpoint, embedding_bytes) for c in chosen]
    print(table(rows))
    texts = {tuple(row.pop("text")) for row in rows if "text" in row}
    print("all wrote the same tokens" if len(texts) == 1 else f"{len(texts)} DIFFERENT TEXTS")
    record.append(
        "generate", args.disk, shape=args.shape, parameters=weight_bytes(checkpoint)
        // config.dtype.itemsize, same_text=len(texts) == 1, rows=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
