"""Does a planned mix of keep, recompute and swap beat recomputing everything, and how near is it
to having all the memory?

A Llama whose activations outweigh its weights, in a plain training loop: all kept without a limit
that matters; then with ``host_memory`` at a share of the peak that this run recorded, under
"auto", "recompute" and "swap". Each setting in its own process; rounds of all settings, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, INTER, VOCAB = 256, 8, 704, 2048


def child(args: argparse.Namespace) -> None:
    """One run: seconds of each step, and what offload says of it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import offload

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTER, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    offload.wrap(
        model, optimizer, host_memory=args.budget, disk=args.disk, activations=args.setting
    )
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    for _ in range(args.steps):
        x = torch.randint(0, VOCAB, (args.batch, args.seq), generator=generator)
        began = time.perf_counter()
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    stats = offload.runtime(model).stats()
    stats["step_bytes"] = None
    print(json.dumps({"seconds": seconds, "losses": losses, "stats": stats}))


def run(args: argparse.Namespace, setting: str, budget: int) -> dict[str, Any]:
    """A child with this setting; its one line."""
    command = [
        sys.executable, __file__, "--child", "--setting", setting, "--budget", str(budget),
        "--disk", args.disk, "--steps", str(args.steps), "--batch", str(args.batch),
        "--seq", str(args.seq),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def steady_s(line: dict[str, Any]) -> float:
    """Median step after the first three: two are recorded, one is planned for the first time."""
    return statistics.median(line["seconds"][3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.4, help="of the recorded peak")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--disk", default="bench-spill")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "activations.jsonl"
    )
    parser.add_argument("--setting", default="keep")
    parser.add_argument("--budget", type=int, default=8 << 30)
    parser.add_argument("--child", action="store_true")
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    lines: dict[str, list[dict[str, Any]]] = {}
    budget = 0
    for _ in range(args.rounds):
        free = run(args, "recompute" if args.share > 1 else "keep", args.budget)
        lines.setdefault("unconstrained", []).append(free)
        budget = budget or int(args.share * free["stats"]["tiers"]["host"]["peak_bytes"])
        for setting in ("auto", "recompute", "swap"):
            lines.setdefault(setting, []).append(run(args, setting, budget))
    report(args, lines, budget)


def report(args: argparse.Namespace, lines: dict[str, list[dict[str, Any]]], budget: int) -> None:
    """Print the table and append the result."""
    medians = {
        name: statistics.median(steady_s(x) for x in runs)
        for name, runs in lines.items()
        if not any("error" in x for x in runs)
    }
    base_s = medians["unconstrained"]
    print(f"budget {budget / 2**20:.0f} MiB = {args.share} x the recorded peak")
    for name, runs in lines.items():
        if name not in medians:
            print(f"{name:14} {runs[-1].get('error')}")
            continue
        stats = runs[-1]["stats"]
        peak = stats["tiers"]["host"]["peak_bytes"]
        print(f"{name:14} {medians[name]:.3f} s = {medians[name] / base_s:.3f} x; "
              f"peak {peak / 2**20:.0f} MiB; {stats['activations']['ways']}")  # fmt: skip
    same = all(
        x["losses"] == lines["unconstrained"][0]["losses"] for n in medians for x in lines[n]
    )
    print(f"same losses: {same}")
    auto = lines["auto"][-1].get("stats", {}).get("activations")
    result = {
        "bench": "activations", "machine": f"{os.cpu_count()} cores", "share": args.share,
        "budget_bytes": budget, "batch": args.batch, "seq": args.seq, "same_losses": same,
        "step_s": medians, "ratio": {n: s / base_s for n, s in medians.items()},
        "peak_bytes": {
            n: lines[n][-1]["stats"]["tiers"]["host"]["peak_bytes"] for n in medians
        },
        "auto": auto,
    }  # fmt: skip
    if auto and auto["forecast_added_s"] is not None and "auto" in medians:
        print(f"auto: predicted {auto['forecast_added_s']:.3f} s added, "
              f"measured {medians['auto'] - base_s:.3f} s")  # fmt: skip
    args.results.parent.mkdir(exist_ok=True)
    with args.results.open("a") as out:
        out.write(json.dumps({**result, "command": " ".join(sys.argv)}) + "\n")


if __name__ == "__main__":
    main()
