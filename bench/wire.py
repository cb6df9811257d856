"""How long is a generated token beside plain reads of the same bytes, seconds apart?

A Llama of 364 M parameters that does not fit its budget generates in turns of a few passes, one row
by the user's own ``generate``, one and many by ``runtime.generate``, with plain reads between them
(bench/pairs.py): the ratio is of the same seconds. Appends a JSON line to bench/results/wire.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import throughput
import torch
from pairs import Turns
from record import append

import offload

WARM = 6


def drop_in(model: Any, turns: Turns, tokens: int) -> None:
    """One row, ``model.generate``."""

    def processor(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        turns()
        return scores

    ids = torch.ones((1, 16), dtype=torch.int64)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False, pad_token_id=0, logits_processor=[processor],
    )  # fmt: skip


def block(rows: int) -> Callable[[Any, Turns, int], None]:
    """Many rows, ``runtime.generate``."""

    def generate(model: Any, turns: Turns, tokens: int) -> None:
        generator = torch.Generator().manual_seed(1)
        prompts = list(torch.randint(3, throughput.VOCABULARY, (rows, 16), generator=generator))
        offload.runtime(model).generate(prompts, tokens, on_step=turns)

    return generate


WAYS = {"one row": drop_in, "block of one": block(1), "block of many": block(16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--budget", default="480MiB")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--passes", type=int, default=5, help="counted passes of a turn")
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    args.kv_heads = 16
    found = {}
    for way in args.ways:
        model = throughput.build(args)
        with offload.runtime(model) as run:
            turns = Turns(run, args.disk, args.passes, WARM)
            WAYS[way](model, turns, WARM + args.turns * (args.passes + 1) + 1)
        found[way] = turns.found
        over = [t["over_reads"] for t in turns.found]
        rate = statistics.median(t["bytes_per_s"] for t in turns.found)
        print(f"{way:13} {statistics.median(over):.2f} x plain reads of the same bytes "
              f"({min(over):.2f} to {max(over):.2f}); {turns.found[-1]['read_bytes'] / 1e6:.0f} MB "
              f"a pass, at {rate / 1e9:.2f} GB/s")  # fmt: skip
    append("wire", args.disk, budget=args.budget, ways=found)


if __name__ == "__main__":
    main()
