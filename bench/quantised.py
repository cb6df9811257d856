"""What do weights in 4 and 8 bits cost in perplexity and in time, and what do they save in bytes?

Three questions, each a subcommand that appends lines to bench/results/quantised.jsonl:

perplexity  a small Llama learns the source text of Python's standard library; then held-out
            perplexity with its own weights, with 8 and with 4 bits, resident and streamed.
decode      a Llama of 364 M parameters (bfloat16, random weights) that does not fit the budget
            decodes token by token: bytes read per token, seconds per token over the bound, with
            weights as they are and quantised. Bars: int4 reads <= 0.30 x bfloat16; <= 1.15 x bound.
            ``bound_s`` has the computing of the steps that the plan was made from, tokens ago;
            ``over_own_bound`` is the median over replayed tokens of each one's time over the bound
            with its own computing, which a machine whose pace changes in between leaves alone.
widen       billions of weights a second that a layer widens and multiplies with, one token, nothing
            to be read, beside plain layers; and widening alone.

Alone on the machine, please.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moments import BATCH, WARMUP, evaluate, learning_rate, llama, loss_of, text
from record import append
from torch import nn

import offload
from offload.cachename import cache_name
from offload.config import Tuning
from offload.groupwise import FORMATS, Scratch, pack
from offload.quantised import BLOCK_ELEMENTS, quantise
from offload.steps import Kind
from offload.tape import Tape
from offload.tiers.spec import MIB, parse_size

WAYS = ("bf16", "int8", "int4")
SKIPPED = 6  # tokens: recorded, or before the plan has settled


def learnt(steps: int) -> tuple[Any, Any]:
    """A trained model of 3.9 M parameters and held-out blocks."""
    tokenizer, blocks, held = text()
    model = llama(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: learning_rate(n, steps))
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(1)).tolist()
    for step in range(steps):
        rows = [order[(step * BATCH + i) % len(order)] for i in range(BATCH)]
        loss_of(model, blocks, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), held


def perplexity(steps: int, disk: Path) -> None:
    """Full precision, and each format: resident and streamed, which must agree to the bit."""
    model, held = learnt(max(steps, WARMUP + 1))
    full = evaluate(model, held)
    note(disk, question="perplexity", way="float32", steps=steps, perplexity=math.exp(full))
    for way in FORMATS:
        losses = []
        for options in ({"host_memory": "1GiB"}, {"host_memory": 20 * MIB, "disk": disk}):
            quantised = copy.deepcopy(model)
            tuning = Tuning(chunk_bytes=MIB // 4)
            offload.wrap(quantised, None, weight_dtype=way, tuning=tuning, **options)
            with offload.runtime(quantised) as run:
                losses.append(evaluate(quantised, held))
                evictions = run.parts.engine.counters.evictions
        if not evictions:
            raise SystemExit("all of it fitted: nothing was streamed")
        note(
            disk, question="perplexity", way=way, steps=steps, perplexity=math.exp(losses[0]),
            change=math.exp(losses[0] - full) - 1, streamed_is_same=losses[0] == losses[1],
            evictions=evictions,
        )  # fmt: skip


def large() -> Any:
    """A Llama of 364 M parameters, 66 M of them embedding and head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=25,
        num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=512,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.no_grad()
def decode(way: str, budget_bytes: int, disk: Path, tokens: int) -> None:
    """Decode one sequence token by token from a budget that the weights do not fit."""
    model = large()
    count = sum(p.numel() for p in model.parameters())
    offload.wrap(
        model, None, host_memory=budget_bytes, disk=disk,
        weight_dtype=None if way == "bf16" else way,
    )  # fmt: skip
    name = cache_name(model.forward)
    ids, cache, taken_s, read, own = torch.tensor([[1]]), None, [], [], []
    with offload.runtime(model) as run:
        meter = run.parts.engine.space.lanes["read"].meter
        for _ in range(tokens):
            began_s, before = time.perf_counter(), meter.moved_bytes
            out = model(input_ids=ids, **{name: cache}, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(-1), getattr(out, name)
            taken_s.append(time.perf_counter() - began_s)
            read.append(meter.moved_bytes - before)
            tape = run.parts.steps.tracks[Kind.INFER].tape
            if tape is not None and tape.began_s > began_s:
                disk_s = run.parts.machine.disk_s(read[-1], 0)
                own.append(taken_s[-1] / max(computed_s(tape), disk_s))
        stats = run.stats()
    token_s = statistics.median(taken_s[SKIPPED:])
    note(
        disk, question="decode", way=way, params=count, budget_bytes=budget_bytes, tokens=tokens,
        token_s=token_s, bound_s=stats["bound_s"], over_bound=token_s / stats["bound_s"],
        over_own_bound=statistics.median(own[-(tokens - SKIPPED) :]), binding=stats["binding"],
        read_bytes_per_token=statistics.median(read[SKIPPED:]),
        peak_bytes=stats["tiers"]["host"]["peak_bytes"],
        temporaries_bytes=stats["temporaries_bytes"], stall_s=stats["stall_s"],
    )  # fmt: skip


def computed_s(tape: Tape) -> float:
    """Seconds of a step in which the engine was neither at work nor waiting."""
    entered = [moment[0] for moment in tape.moments[1:]] + [tape.ended_s]
    between = zip(tape.moments, entered, strict=True)
    waited_s = sum(b - a for a, b, _, _ in tape.stalls if a > tape.moments[-1][1])
    return sum(then - left for (_, left, _, _), then in between) - waited_s


@torch.no_grad()
def widen(disk: Path) -> None:
    """Layers of 1024 x 2816, more of them than the caches hold."""
    elements, count = 2816 * 1024, 48
    for way, form in FORMATS.items():
        part = pack(torch.randn(BLOCK_ELEMENTS // 1024, 1024), form)
        scratch = Scratch(BLOCK_ELEMENTS)
        row: dict[str, float] = {}
        for dtype in (torch.float32, torch.bfloat16):
            taken_s = least_s(lambda: scratch.unpack(part, form, dtype))  # noqa: B023
            row[f"{dtype}_unpack".removeprefix("torch.")] = BLOCK_ELEMENTS / taken_s / 1e9
        for dtype in (torch.float32, torch.bfloat16):
            layers = nn.Sequential(*(nn.Linear(1024, 2816, bias=False) for _ in range(count)))
            layers.to(dtype)
            x = torch.randn(1, 1024, dtype=dtype)
            plain_s = least_s(lambda: [layer(x) for layer in layers])  # noqa: B023
            quantise(layers, form, None, lambda s: torch.empty(s, dtype=torch.uint8), print)
            packed_s = least_s(lambda: [layer(x) for layer in layers])  # noqa: B023
            name = str(dtype).removeprefix("torch.")
            row[f"{name}_plain"] = elements * count / plain_s / 1e9
            row[f"{name}_quantised"] = elements * count / packed_s / 1e9
        note(disk, question="widen", way=way, giga_weights_per_s=row)


def least_s(work: Callable[[], object], rounds: int = 7) -> float:
    """Least seconds of several runs."""
    taken = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began_s)
    return min(taken)


def note(disk: Path, **row: Any) -> None:
    """Show a result and append it."""
    print(row, flush=True)
    append("quantised", disk.parent, threads=torch.get_num_threads(), **row)


def main() -> None:
    """Answer one of the questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=("perplexity", "decode", "widen"))
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--steps", type=int, default=600, help="of training, for perplexity")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--budget", type=parse_size, default=parse_size("120MiB"))
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.disk) as folder:
        if args.question == "perplexity":
            perplexity(args.steps, Path(folder))
        elif args.question == "widen":
            widen(Path(folder))
        else:
            for way in args.ways:
                decode(way, args.budget, Path(folder), args.tokens)


if __name__ == "__main__":
    main()
