"""One contestant of bench/generate.py: loads a local checkpoint and generates, noting the times.

Run by the Python of our environment or of .venv-peers/accelerate: each kind imports what it needs.
To add a contestant write a function (args) -> (generate, stats) and name it in KINDS.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

Clock = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Generate = Callable[[torch.Tensor, int, Clock], list[int]]
Stats = Callable[[], dict[str, Any]]


def say(**values: Any) -> None:
    """One JSON line to whoever runs this contestant."""
    print(json.dumps(values), flush=True)


def greedy(model: Any) -> Generate:
    """``model.generate`` as a user would call it."""

    def generate(ids: torch.Tensor, tokens: int, clock: Clock) -> list[int]:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            min_new_tokens=tokens, pad_token_id=0, logits_processor=[clock],
        )  # fmt: skip
        result: list[int] = out[0, ids.shape[1] :].tolist()
        return result

    return generate


def plain(args: argparse.Namespace) -> tuple[Generate, Stats]:
    """transformers alone, the model in memory."""
    return greedy(AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="auto")), dict


def offload_drop_in(args: argparse.Namespace) -> tuple[Generate, Stats]:
    """``offload.from_pretrained``, then the user's own ``generate``."""
    import offload

    model = offload.from_pretrained(
        args.checkpoint, host_memory=args.budget, disk=args.disk / "spill"
    )
    return greedy(model), lambda: offload.runtime(model).stats()


def accelerate_disk(args: argparse.Namespace) -> tuple[Generate, Stats]:
    """accelerate's disk offload, by a device map; embedding and norm stay in memory."""
    layers = AutoConfig.from_pretrained(args.checkpoint).num_hidden_layers
    places = {f"model.layers.{i}": "disk" for i in range(layers)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        args.checkpoint, dtype="auto", device_map=places | {"lm_head": "disk"},
        offload_folder=args.disk / "accelerate",
    )  # fmt: skip
    return greedy(model), dict


def accelerate_cpu(args: argparse.Namespace) -> tuple[Generate, Stats]:
    """accelerate's cpu_offload: the weights in host memory, handed to the CPU when used."""
    from accelerate import cpu_offload

    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype="auto")
    return greedy(cpu_offload(model, execution_device=torch.device("cpu"))), dict


KINDS: dict[str, Callable[[argparse.Namespace], tuple[Generate, Stats]]] = {
    "plain": plain,
    "offload": offload_drop_in,
    "accelerate-disk": accelerate_disk,
    "accelerate-cpu": accelerate_cpu,
}


def measure(generate: Generate, ids: torch.Tensor, tokens: int) -> dict[str, Any]:
    """Seconds to the first token and of each further one; the tokens."""
    marks = [time.perf_counter()]

    def clock(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        marks.append(time.perf_counter())
        return scores

    text = generate(ids, tokens, clock)
    each_s = [b - a for a, b in itertools.pairwise(marks)]
    return {"first_s": each_s[0], "each_s": each_s[1:], "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--disk", type=Path, required=True)
    parser.add_argument("--budget")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    began_s = time.perf_counter()
    generate, stats = KINDS[args.kind](args)
    say(load_s=time.perf_counter() - began_s)
    vocabulary = AutoConfig.from_pretrained(args.checkpoint).vocab_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, vocabulary, (1, args.prompt), generator=generator)
    seen = measure(generate, ids, args.tokens)
    half = len(seen["each_s"]) // 2  # the first ones record, plan and warm up
    say(**seen, token_s=statistics.median(seen["each_s"][half:]), stats=stats())


if __name__ == "__main__":
    main()
