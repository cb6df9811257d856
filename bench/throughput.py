"""How many tokens a second does generation give, one row at a time and many? In a memory cgroup.

A Llama of 364 M parameters (fp32, 24 layers of width 1024, vocabulary 32000) with random weights,
1.36 GiB, in a child process that has less memory than that. Greedy, all rows as long as allowed.
One child per way: ``1``: one prompt; ``32``: so many at once, as `runtime.generate` chooses;
``8x4``: four micro-batches of eight. Tokens a second of the whole call (with its prompts) and of
its one-token steps. Appends a JSON line to results/throughput.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from memory import run_in_cgroup
from pairs import Turns
from record import append

from offload.tiers.spec import parse_size

HIDDEN, LAYERS, INNER, VOCABULARY = 1024, 24, 2688, 32000
WARM, PASSES = 4, 4  # of --paired: passes before the first turn, and counted ones of a turn


def build(args: argparse.Namespace) -> Any:
    """A managed model that was never whole in memory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import offload

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER,
        num_hidden_layers=LAYERS, num_attention_heads=16, num_key_value_heads=args.kv_heads,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return offload.init(
        lambda: LlamaForCausalLM(config).eval(), host_memory=args.budget, disk=args.disk
    )


def child(args: argparse.Namespace) -> None:
    """One way to generate; a JSON line at the end."""
    import os

    import torch

    import offload
    from offload.places import BlockPlan

    torch.set_num_threads(os.cpu_count() or 1)
    model = build(args)
    run = offload.runtime(model)
    batch, _, count = args.child.partition("x")
    rows = int(batch) * int(count or 1)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCABULARY, (rows, args.prompt), generator=generator)
    steps: list[Any] = []
    plan = BlockPlan(int(batch), int(count)) if count else None
    turns = Turns(run, Path(args.disk), PASSES, WARM) if args.paired else None

    def on_step(step: Any) -> None:
        steps.append(step)
        if turns is not None:
            turns()

    read = run.parts.engine.space.lanes["read"].meter
    began_bytes, began_s = read.moved_bytes, time.perf_counter()
    run.generate(
        list(prompts),
        args.new,
        plan=plan,
        kv_memory=args.kv_memory,
        kv_dtype=args.kv_dtype,
        on_step=on_step,
    )
    took_s = time.perf_counter() - began_s
    later = [s for s in steps[3:] if not s.prompt_tokens]  # planned, not recorded
    step_s = statistics.median(s.step_s for s in later)
    at_once = statistics.median(s.new_tokens for s in later)
    bound_s = later[-1].bound_s
    print(json.dumps({
        "rows": rows, "at_once": at_once, "micro_batches": later[-1].micro_batches,
        "whole_s": took_s, "whole_tokens_per_s": rows * args.new / took_s,
        "step_s": step_s, "tokens_per_s": at_once / step_s, "bound_s": bound_s,
        "over_bound": step_s / bound_s if bound_s else None, "prompt_s": steps[0].step_s,
        "read_bytes_per_step": (read.moved_bytes - began_bytes) / len(steps),
        "weight_bytes": 4 * sum(p.numel() for p in model.parameters()),
        "reserved_bytes": run.parts.engine.ledger.peak_other_bytes,
        "stall_s": run.stats()["stall_s"], "lanes": run.stats()["lanes"],
        "pairs": turns.found if turns is not None else None,
        "kv": run.stats()["kv"], "trims": run.parts.engine.ledger.heap.trims,
    }), flush=True)  # fmt: skip
    run.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", default=["1", "32"])
    parser.add_argument("--limit", default="800MiB")
    parser.add_argument("--budget", default="480MiB")
    parser.add_argument("--disk", default="bench-spill")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--kv-memory", help="keys and values in tiers, in so much memory")
    parser.add_argument("--kv-dtype", choices=("int4", "int2"))
    parser.add_argument("--paired", action="store_true", help="of a child: plain reads in between")
    parser.add_argument("--no-record", action="store_true")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    found = {}
    for way in args.ways:
        command = [
            sys.executable, __file__, "--child", way, "--budget", args.budget, "--disk", args.disk,
            "--prompt", str(args.prompt), "--new", str(args.new), "--kv-heads", str(args.kv_heads),
            *(["--kv-memory", args.kv_memory] if args.kv_memory else []),
            *(["--kv-dtype", args.kv_dtype] if args.kv_dtype else []),
        ]  # fmt: skip
        ended = run_in_cgroup(command, parse_size(args.limit))
        lines = ended["lines"]
        if ended["code"] or not lines:
            peak_mib = ended["peak_anon_bytes"] / 2**20
            print(f"{way:>6}: exit {ended['code']}, peak {peak_mib:.0f} MiB")
            continue
        row = found[way] = lines[-1] | {"peak_anon_bytes": ended["peak_anon_bytes"]}
        print(f"{way:>6}: {row['tokens_per_s']:7.2f} tokens/s in steps of {row['step_s']:.3f} s, "
              f"{row['over_bound'] or 0:.2f} x bound; whole {row['whole_tokens_per_s']:.2f} "
              f"tokens/s, prompts {row['prompt_s']:.2f} s; read "
              f"{row['read_bytes_per_step'] / 2**20:.0f} MiB a step; peak "
              f"{row['peak_anon_bytes'] / 2**20:.0f} MiB")  # fmt: skip
    first = found.get(args.ways[0])
    for way, row in list(found.items())[1:]:
        row["over_first"] = row["tokens_per_s"] / first["tokens_per_s"]
        row["whole_over_first"] = row["whole_tokens_per_s"] / first["whole_tokens_per_s"]
        print(f"{way} / {args.ways[0]} = {row['over_first']:.1f} (whole "
              f"{row['whole_over_first']:.1f})")  # fmt: skip
    if not args.no_record:
        append(
            "throughput", Path(args.disk), limit=args.limit, budget=args.budget,
            prompt_tokens=args.prompt, new_tokens=args.new, kv_heads=args.kv_heads,
            kv_memory=args.kv_memory, kv_dtype=args.kv_dtype, ways=found,
        )  # fmt: skip


if __name__ == "__main__":
    main()
