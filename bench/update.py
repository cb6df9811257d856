"""How fast is the chunked update beside the optimizer's own step? In RAM, so pure overhead.

Bars: fused AdamW at least 0.95 x plain; for-loop AdamW faster than plain; same bits in both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.optim.mirror import profile
from offload.optim.ram import RamStore
from offload.optim.step import PIECE_ELEMENTS, ChunkedStep

RESULTS = Path(__file__).parent / "results" / "update.jsonl"
LAYER = ((4096, 1024), (1024, 4096), (1024, 1024), (1024,))


def make_params(elements: int) -> list[nn.Parameter]:
    """Layers as in a small transformer, with gradients, about ``elements`` in all."""
    generator = torch.Generator().manual_seed(0)
    params: list[nn.Parameter] = []
    while sum(p.numel() for p in params) < elements:
        for shape in LAYER:
            p = nn.Parameter(torch.randn(shape, generator=generator))
            p.grad = torch.randn(shape, generator=generator) * 1e-2
            params.append(p)
    return params


def alternate(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> list[float]:
    """Least seconds of both, in turns: what they take when nothing else wants the cores."""
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, into in zip((first, second), times, strict=True):
            start_s = time.perf_counter()
            run()
            into.append(time.perf_counter() - start_s)
    return [min(t) for t in times]


def measure(flags: dict[str, Any], args: argparse.Namespace) -> dict[str, object]:
    """One flavour of AdamW, plain and chunked, from the same weights and gradients."""
    plain_params, chunked_params = make_params(args.params), make_params(args.params)
    plain = torch.optim.AdamW(plain_params, **flags)
    chunked = torch.optim.AdamW(chunked_params, **flags)
    known = profile(chunked)
    store = RamStore(chunked, known, args.group)
    ChunkedStep(chunked, known, store, piece_elements=args.piece)
    plain.step()
    chunked.step()  # state is made here
    plain_s, chunked_s = alternate(plain.step, chunked.step, args.rounds)
    same = all(torch.equal(a, b) for a, b in zip(plain_params, chunked_params, strict=True))
    elements = sum(p.numel() for p in plain_params)
    return {
        "flavour": next(iter(flags), "for-loop"),
        "params": elements,
        "plain_mparams_per_s": elements / plain_s / 1e6,
        "chunked_mparams_per_s": elements / chunked_s / 1e6,
        "ratio": plain_s / chunked_s,
        "same_bits": same,
    }


def main() -> None:
    """Measure, print a table, append one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=64_000_000)
    parser.add_argument("--piece", type=int, default=PIECE_ELEMENTS, help="elements per piece")
    parser.add_argument("--group", type=int, default=1 << 24, help="elements per update group")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rows = [measure(flags, args) for flags in ({"fused": True}, {}, {"foreach": True})]
    print(f"{'AdamW':10} {'plain':>10} {'chunked':>10} {'ratio':>7}  bits   (M params/s)")
    for row in rows:
        print(
            f"{row['flavour']:10} {row['plain_mparams_per_s']:10.0f} "
            f"{row['chunked_mparams_per_s']:10.0f} {row['ratio']:7.2f}  "
            f"{'same' if row['same_bits'] else 'DIFFER'}"
        )
    line = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "piece_elements": args.piece,
        "group_elements": args.group,
        "rows": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
