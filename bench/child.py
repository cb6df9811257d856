"""What every contestant shares: the model, the batches, and a process that steps when it is told.

Imported by contestants in any environment, peers' too: needs torch and transformers, nothing of
ours. A contestant reads how many steps to take from stdin, one number a line; it prints a JSON
line a step and one when it has done them. A line that is a JSON object has the disk's rates of that
moment, for its bounds. The end of stdin ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions; heads of 64, embeddings not tied."""

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int = 8192

    @property
    def parameters(self) -> int:
        """How many there are."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return 2 * self.embedding + self.layers * layer + self.hidden

    @property
    def embedding(self) -> int:
        """Elements of the input embedding, which forward and backward do not read as a whole."""
        return self.vocabulary * self.hidden


SHAPES = {
    "tiny": Shape(64, 2, 128, 512),
    "8m": Shape(256, 8, 704, 2048),  # whose activations, of many tokens, outweigh its weights
    "25m": Shape(384, 10, 1088),
    "100m": Shape(768, 12, 2048),  # 97.5 M parameters, the model of all the bars
    "400m": Shape(1280, 19, 3456),
    "1.5b": Shape(2048, 29, 5504),
}


def build(shape: Shape) -> LlamaForCausalLM:
    """The model with random weights, the same for every contestant of one torch version."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden,
            intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // 64, num_key_value_heads=shape.hidden // 64,
            use_cache=False,
        )
    )  # fmt: skip


def batches(shape: Shape, tokens: int, rows: int = 1) -> Iterator[torch.Tensor]:
    """Random token ids [rows, tokens] for ever."""
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(0, shape.vocabulary, (rows, tokens), generator=generator)


def arguments(kinds: tuple[str, ...]) -> argparse.Namespace:
    """What a contestant is told on its command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=kinds)
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--budget", default="400MiB")
    parser.add_argument("--disk", type=Path, required=True)
    return parser.parse_args()


def anonymous_bytes(pid: int | str = "self") -> int:
    """Private and shared anonymous memory of a process, from outside as from inside; 0: gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(x.split()[1]) << 10 for x in lines if x.startswith(("RssAnon", "RssShmem")))


def say(**values: Any) -> None:
    """One JSON line to whoever runs this contestant."""
    print(json.dumps(values), flush=True)


def serve(
    ready: Callable[[], Callable[[torch.Tensor], torch.Tensor]],
    args: argparse.Namespace,
    stats: Callable[[], dict[str, Any]] = dict,
    measured: Callable[[dict[str, float]], None] = lambda _: None,
) -> None:
    """Make ready, then take the steps asked for. ``ready`` returns a step: ids in, loss out.

    ``measured`` is told of rates of the disk.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    say(base_bytes=anonymous_bytes())
    step, source = ready(), batches(SHAPES[args.shape], args.tokens, args.rows)
    say(turn=0)
    for line in sys.stdin:
        if line.startswith("{"):
            measured(json.loads(line))
            continue
        for _ in range(int(line)):
            ids, began_s = next(source), time.perf_counter()
            loss = step(ids)
            took_s = time.perf_counter() - began_s
            say(step_s=took_s, loss=loss.item(), stats=stats())
        say(turn=int(line))
