"""How fast is the chunked update beside the optimizer's own step? In RAM, so pure overhead.

Bars: fused AdamW at least 0.95 x plain and 0.75 x a loop with the same reads and writes; for-loop
AdamW faster than plain; with bfloat16 gradients in and a bfloat16 copy out, fused AdamW at least
1.2 x converting, stepping and copying one after the other; same bits in all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.optim.mirror import profile
from offload.optim.mixed import MixedTensors
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


def in_turns(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each, taken in turns so that a drift of the machine hits all alike."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, into in zip(runs, times, strict=True):
            start_s = time.perf_counter()
            run()
            into.append(time.perf_counter() - start_s)
    return [statistics.median(t) for t in times]


def same_traffic(elements: int) -> Callable[[], object]:
    """A loop that reads four arrays and writes three of them, as AdamW must, and little else."""
    weight, grad, first, second = (torch.ones(elements) for _ in range(4))

    def sweep() -> None:
        weight.add_(grad)  # reads two, writes one
        first.mul_(1.0)
        second.mul_(1.0)

    return sweep


def measure(flags: dict[str, Any], args: argparse.Namespace) -> dict[str, object]:
    """One flavour of AdamW, plain and chunked, from the same weights and gradients.

    Several pairs with memory of their own: where pages happen to lie makes 5% of difference.
    """
    ratios, shares, rates, same = [], [], [], True
    for _ in range(args.instances):
        plain_params, chunked_params = make_params(args.params), make_params(args.params)
        elements = sum(p.numel() for p in plain_params)
        plain = torch.optim.AdamW(plain_params, **flags)
        chunked = torch.optim.AdamW(chunked_params, **flags)
        known = profile(chunked)
        ChunkedStep(chunked, known, RamStore(chunked, known, args.group), piece_elements=args.piece)
        plain.step()
        chunked.step()  # state is made here
        sweep = same_traffic(elements)
        plain_s, chunked_s, sweep_s = in_turns([plain.step, chunked.step, sweep], args.rounds)
        same &= all(torch.equal(a, b) for a, b in zip(plain_params, chunked_params, strict=True))
        ratios.append(plain_s / chunked_s)
        shares.append(sweep_s / chunked_s)
        rates.append(elements / chunked_s / 1e6)
    return {
        "flavour": next(iter(flags), "for-loop"),
        "params": elements,
        "chunked_mparams_per_s": statistics.median(rates),
        "over_plain": statistics.median(ratios),
        "over_plain_all": ratios,
        "of_memory_bound": statistics.median(shares),
        "same_bits": same,
    }


class InSequence:
    """Convert the gradients, step, copy the weights: over whole tensors, one after the other.

    The gradients are converted into new memory, as ``.float()`` does, or (``reuse``) into the same
    memory at each step, which spares the page faults and costs that memory all the time.
    """

    def __init__(self, params: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._kept = [torch.empty_like(p) for p in params]
        self.gradients = {p: p.grad.bfloat16() for p in params if p.grad is not None}
        self.copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in params}

    def step(self, *, reuse: bool) -> None:
        """One step."""
        for (param, narrow), kept in zip(self.gradients.items(), self._kept, strict=True):
            param.grad = kept.copy_(narrow) if reuse else narrow.float()
        self._optimizer.step()
        with torch.no_grad():
            for param, copied in self.copies.items():
                copied.copy_(param)
        for param in self.gradients:
            param.grad = None


def measure_mixed(args: argparse.Namespace) -> dict[str, object]:
    """Fused AdamW with bfloat16 gradients and copies: in sequence over the whole, and chunked."""
    ratios, reusing, rates, same = [], [], [], True
    for _ in range(args.instances):
        params, chunked_params = make_params(args.params), make_params(args.params)
        elements = sum(p.numel() for p in params)
        plain = InSequence(params, torch.optim.AdamW(params, fused=True))
        chunked = torch.optim.AdamW(chunked_params, fused=True)
        known = profile(chunked)
        into = InSequence(chunked_params, chunked)
        mixed = MixedTensors(into.gradients, into.copies)
        for param in chunked_params:
            param.grad = None
        store = RamStore(chunked, known, args.group, mixed)
        ChunkedStep(chunked, known, store, piece_elements=args.piece)
        plain.step(reuse=True)
        chunked.step()  # state is made here
        runs = [partial(plain.step, reuse=False), partial(plain.step, reuse=True), chunked.step]
        plain_s, reusing_s, chunked_s = in_turns(runs, args.rounds)
        for _ in range(args.rounds):  # the two sequences step the same weights, one after the other
            chunked.step()
        pairs = zip(params, chunked_params, strict=True)
        same &= all(
            torch.equal(a, b) and torch.equal(plain.copies[a], into.copies[b]) for a, b in pairs
        )
        ratios.append(plain_s / chunked_s)
        reusing.append(reusing_s / chunked_s)
        rates.append(elements / chunked_s / 1e6)
    return {
        "flavour": "fused, bf16 gradients and copies",
        "params": elements,
        "chunked_mparams_per_s": statistics.median(rates),
        "over_sequence": statistics.median(ratios),
        "over_sequence_all": ratios,
        "over_sequence_in_kept_memory": statistics.median(reusing),
        "over_sequence_in_kept_memory_all": reusing,
        "same_bits": same,
    }


def in_float32(args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure the flavours of AdamW over float32 alone and print a table."""
    rows = [measure(flags, args) for flags in ({"fused": True}, {}, {"foreach": True})]
    print(f"{'AdamW':10} {'M params/s':>10} {'x plain':>8} {'x memory bound':>15}  bits")
    for row in rows:
        print(
            f"{row['flavour']:10} {row['chunked_mparams_per_s']:10.0f} {row['over_plain']:8.2f} "
            f"{row['of_memory_bound']:15.2f}  {'same' if row['same_bits'] else 'DIFFER'}"
        )
    return rows


def main() -> None:
    """Measure, print, append one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=32_000_000)
    parser.add_argument("--piece", type=int, default=PIECE_ELEMENTS, help="elements per piece")
    parser.add_argument("--group", type=int, default=1 << 24, help="elements per update group")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--instances", type=int, default=5, help="pairs with fresh memory")
    parser.add_argument("--only", choices=["float32", "bfloat16"], help="of gradients and copies")
    args = parser.parse_args()
    rows = [] if args.only == "bfloat16" else in_float32(args)
    if args.only != "float32":
        mixed = measure_mixed(args)
        print(
            f"bf16 gradients in, bf16 copy out: {mixed['chunked_mparams_per_s']:.0f} M params/s, "
            f"{mixed['over_sequence']:.2f} x g.float(), step, copy; "
            f"{mixed['over_sequence_in_kept_memory']:.2f} x the same into kept memory; "
            f"bits {'same' if mixed['same_bits'] else 'DIFFER'}"
        )
        rows.append(mixed)
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
