"""Does a model several times larger than its memory train inside a memory cgroup?

Runs a Llama of the asked size for a few steps in a child process inside a memory cgroup
(v1 or v2; root), watches the child's anonymous memory from outside, and compares with the
same script over a tiny model. Appends a JSON line to bench/results/memory.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from traffic import minimum_bytes

SHAPES = {  # hidden, layers, intermediate, vocabulary
    "tiny": (64, 2, 128, 512),
    "250m": (1024, 14, 2816, 32000),
    "1b": (2048, 20, 5504, 32000),
}


def child(args: argparse.Namespace) -> None:
    """The user's script: three lines of offload in a plain loop."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import offload
    from offload.tiers.spec import parse_size

    torch.set_num_threads(os.cpu_count() or 1)
    hidden, layers, inter, vocab = SHAPES[args.shape]
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
    )  # fmt: skip
    torch.manual_seed(0)
    began = time.perf_counter()
    if args.plain:
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        model = offload.init(
            lambda: LlamaForCausalLM(config), host_memory=args.budget, disk=args.disk
        )
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        model, optimizer = offload.wrap(model, optimizer)
    print(json.dumps({"ready_s": time.perf_counter() - began}), flush=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(args.steps):
        began = time.perf_counter()
        x = torch.randint(0, vocab, (1, args.seq), generator=generator)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        took = time.perf_counter() - began
        print(json.dumps({"step": step, "loss": loss.item(), "step_s": took}), flush=True)
    if not args.plain:
        stats = offload.runtime(model).stats()
        weight_bytes = 4 * sum(p.numel() for p in model.parameters())
        stats["minimum_bytes"] = minimum_bytes(
            weight_bytes, 2, parse_size(args.budget), 4 * vocab * hidden
        )
        stats["parameters"] = weight_bytes // 4
        print(json.dumps({"stats": stats}), flush=True)


def cgroup(limit_bytes: int) -> tuple[str, Path]:
    """Make a memory cgroup with this limit; the name of its process list, and its folder."""
    v1 = Path("/sys/fs/cgroup/memory")
    if v1.is_dir():
        group = v1 / f"offload-bench-{os.getpid()}"
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    else:
        group = Path("/sys/fs/cgroup") / f"offload-bench-{os.getpid()}"
        group.mkdir()
        (group / "memory.max").write_text(str(limit_bytes))
        (group / "memory.swap.max").write_text("0")
    return "cgroup.procs", group


def watch(args: argparse.Namespace, shape: str, limit_bytes: int) -> dict[str, Any]:
    """Run the child inside the cgroup; its lines, exit code and peak anonymous bytes."""
    command = [
        sys.executable, __file__, "--child", "--shape", shape, "--budget", args.budget,
        "--disk", args.disk, "--steps", str(args.steps), "--seq", str(args.seq),
        *(["--plain"] if args.plain else []),
    ]  # fmt: skip
    return run_in_cgroup(command, limit_bytes)


def run_in_cgroup(command: list[str], limit_bytes: int) -> dict[str, Any]:
    """Run a command that prints JSON lines: these, its exit code and peak anonymous bytes."""
    procs, group = cgroup(limit_bytes)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: (group / procs).write_text(str(os.getpid())),
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            line = next(x for x in status.splitlines() if x.startswith("RssAnon"))
            peak = max(peak, int(line.split()[1]) * 1024)
        except (OSError, StopIteration):
            pass
        time.sleep(0.01)
    assert process.stdout is not None
    lines = [json.loads(x) for x in process.stdout.read().splitlines() if x.startswith("{")]
    for _ in range(50):
        try:
            group.rmdir()
            break
        except OSError:
            time.sleep(0.1)
    return {"lines": lines, "code": process.returncode, "peak_anon_bytes": peak}


def summarise(run: dict[str, object]) -> None:
    """Print the ratios that the promises are about."""
    lines = run["lines"]
    assert isinstance(lines, list)
    stats = next((x["stats"] for x in lines if "stats" in x), None)
    if stats is None or not stats["step_s"]:
        return
    moved = stats["step_bytes"]["read"] + stats["step_bytes"]["write"]
    print(f"step {stats['step_s']:.2f} s = {stats['step_s'] / stats['bound_s']:.2f} x bound "
          f"{stats['bound_s']:.2f} s; moved {moved / 1e9:.1f} GB = "
          f"{moved / stats['minimum_bytes']:.2f} x minimum")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--limit", default="4GiB")
    parser.add_argument("--budget", default="3GiB")
    parser.add_argument("--disk", default="bench-spill")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "memory.jsonl"
    )
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    from offload.tiers.spec import parse_size

    base = watch(args, "tiny", parse_size(args.limit))
    run = watch(args, args.shape, parse_size(args.limit))
    result = {
        "bench": "memory", "shape": args.shape, "limit": args.limit, "budget": args.budget,
        "plain": args.plain, "base_anon_bytes": base["peak_anon_bytes"], **run,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    summarise(run)
    over = int(run["peak_anon_bytes"]) - int(base["peak_anon_bytes"])  # type: ignore[call-overload]
    print(f"peak anonymous less the tiny run's: {over / 2**20:.0f} MiB; exit {run['code']}")
    with args.results.open("a") as out:
        out.write(json.dumps({**result, "command": " ".join(sys.argv)}) + "\n")


if __name__ == "__main__":
    main()
