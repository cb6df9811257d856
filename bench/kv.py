"""What a token costs with the KV cache in memory, partly on disk, and in 4 bits.

One small model whose weights all fit, so that the cache is what is measured: caches are filled with
random keys and values, then decoded from, round by round over all settings; medians of the steps.
``bound_s``: the slower of a token with everything in memory and the streamed bytes at the disk's
rate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import record
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import offload
from offload.cachename import cache_name
from offload.tiers.probe import cached_probe
from offload.tiers.spec import MIB

LAYERS, HEADS, DIM = 12, 4, 64


def build(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=HEADS, head_dim=DIM,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def step_s(model: Any, cache: Any, rows: int) -> float:
    """Seconds of one token for every row."""
    began_s = time.perf_counter()
    with torch.no_grad():
        model(torch.ones(rows, 1, dtype=torch.long), **{cache_name(model.forward): cache})
    return time.perf_counter() - began_s


def fill(cache: Any, rows: int, tokens: int, dtype: torch.dtype) -> None:
    for layer in range(LAYERS):
        cache.update(*torch.randn(2, rows, HEADS, tokens, DIM).to(dtype).unbind(), layer)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    torch.set_num_threads(os.cpu_count() or 1)
    whole = 2 * args.rows * HEADS * DIM * dtype.itemsize * LAYERS * (args.tokens + args.steps + 8)
    model = build(dtype)
    offload.wrap(model, host_memory=4 * whole + 512 * MIB, disk=args.disk)
    run, results = offload.runtime(model), {}
    # The first setting pays for kernels that are prepared for each length, and is not reported.
    settings = {"warm-up": None, "DynamicCache": None, "memory": (4.0, None),
                "half": (0.5, None), "quarter": (0.25, None), "int4": (4.0, "int4")}  # fmt: skip
    for name, how in settings.items():
        cache: Any = DynamicCache(config=model.config)
        if how is not None:
            cache = run.kv_cache(memory=int(how[0] * whole), kv_dtype=how[1])
        fill(cache, args.rows, args.tokens, dtype)
        for _ in range(2):
            step_s(model, cache, args.rows)
        read = run.stats()["lanes"]["read"]["bytes"]
        seconds = [step_s(model, cache, args.rows) for _ in range(args.steps)]
        read_bytes = (run.stats()["lanes"]["read"]["bytes"] - read) / args.steps
        results[name] = {"token_s": statistics.median(seconds), "read_bytes": read_bytes}
        if how is not None:
            told = cache.stats()
            results[name] |= {k: told[k] for k in ("key_error", "value_error", "demand_reads")}
            cache.close()
        del cache
    run.close()
    del results["warm-up"]
    rate = cached_probe(args.disk).read_bytes_per_s
    for result in results.values():
        result["bound_s"] = max(results["memory"]["token_s"], result["read_bytes"] / rate)
    return {"kv_bytes": whole, "read_bytes_per_s": rate, "settings": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    values = measure(args)
    for name, result in values["settings"].items():
        token_ms, moved = result["token_s"] * 1e3, result["read_bytes"] / 1e6
        ratio = result["token_s"] / result["bound_s"]
        print(f"{name:14} {token_ms:8.1f} ms  {moved:7.1f} MB  {ratio:.2f} x bound", result)
    if not args.no_record:
        record.append(
            "kv", args.disk, dtype=args.dtype, rows=args.rows, tokens=args.tokens, **values
        )


if __name__ == "__main__":
    main()
