"""What a token costs where attention to a history on the host is computed there, or after a copy.

The emulated device, whose memory is the host's: a copy to it runs at the rate of one worker's
memory copy, and its products are the host's. So this shows what our own code costs and whether
"auto" picks the faster; which one is faster on a GPU, bench/gpu says. Settings take turns, token by
token.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import record
import torch
from kv import DIM, HEADS, LAYERS, build, fill, step_s
from transformers import DynamicCache

import offload
from offload.config import Tuning
from offload.tiers.spec import MIB

WAYS = ("host", "device", "auto")


def managed(args: argparse.Namespace, whole: int, way: str) -> tuple[Any, Any]:
    """A model in frames with a filled cache of its own."""
    model = build(torch.float32)
    offload.wrap(
        model, device="emulated", device_memory=whole // LAYERS * 3 + 128 * MIB,
        host_memory=2 * whole + 256 * MIB, disk=args.disk, tuning=Tuning(trust_versions=True),
    )  # fmt: skip
    cache = offload.runtime(model).kv_cache(attention=way)
    with torch.no_grad():
        fill(cache, args.rows, args.tokens, torch.float32)
    return model, cache


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(os.cpu_count() or 1)
    whole = 2 * args.rows * HEADS * DIM * 4 * LAYERS * (args.tokens + args.steps + 8)
    plain = build(torch.float32)
    in_memory: Any = DynamicCache(config=plain.config)
    fill(in_memory, args.rows, args.tokens, torch.float32)
    runs = {"DynamicCache": (plain, in_memory)}
    runs |= {way: managed(args, whole, way) for way in WAYS}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.steps + args.warm):
        for name, (model, cache) in runs.items():
            took_s = step_s(model, cache, args.rows)
            if i >= args.warm:
                seconds[name].append(took_s)
    found: dict[str, Any] = {n: {"token_s": statistics.median(s)} for n, s in seconds.items()}
    for way in WAYS:
        model, cache = runs[way]
        found[way]["device"] = cache.stats()["device"]
        cache.close()
        offload.runtime(model).close()
    return {"kv_bytes": whole, "settings": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warm", type=int, default=6, help="recorded, planned and tried")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    values = measure(args)
    for name, result in values["settings"].items():
        print(f"{name:14} {result['token_s'] * 1e3:8.1f} ms", result.get("device", ""))
    if not args.no_record:
        record.append("attend", args.disk, rows=args.rows, tokens=args.tokens, **values)


if __name__ == "__main__":
    main()
