"""What does narrow optimizer state cost in loss and in time, and what does it save in bytes?

Three questions, each a subcommand that appends a line to bench/results/moments.jsonl:

loss   a small Llama learns the text of Python's standard library with AdamW (beta2 = 0.999), once
       with each way to keep its moments; the same weights, batches and learning rates throughout.
bytes  the same model in a budget that it does not fit: bytes read and written per step.
time   seconds of the update alone, everything in RAM: nanoseconds per parameter. Alone on the
       machine, please.

``nearest`` is bfloat16 without stochastic rounding, which the library does not offer: to show why.
``int8-stochastic`` rounds the 8-bit codes without bias: to see whether the nearest code loses.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload import data
from offload.config import Tuning
from offload.optim.codecs import Bfloat16, Blockwise, Codec, Noise, Part
from offload.optim.learn import learn
from offload.optim.narrow import Narrowing
from offload.optim.ram import RamStore
from offload.optim.step import ChunkedStep
from offload.runconfig import DataConfig
from offload.tiers.spec import MIB
from offload.tinymodel import train_tokenizer

RESULTS = Path(__file__).parent / "results" / "moments.jsonl"
WAYS = ("float32", "bf16", "nearest", "int8", "int8-stochastic")
STATE_DTYPES = {"float32": None, "bf16": "bf16", "nearest": "bf16", "int8": "int8"}
SEQ_LEN, BATCH, WARMUP = 64, 8, 50


@dataclass(frozen=True, slots=True)
class Nearest:
    """A codec that leaves its noise unused."""

    codec: Codec

    @property
    def own(self) -> torch.dtype:
        return self.codec.own

    @property
    def parts(self) -> Mapping[str, Part]:
        return self.codec.parts

    def widen(self, stored: Sequence[Tensor]) -> Tensor:
        return self.codec.widen(stored)

    def narrow(self, values: Tensor, stored: Sequence[Tensor], noise: Noise | None) -> None:
        self.codec.narrow(values, stored, None)


@dataclass(frozen=True, slots=True)
class Undecided(Nearest):
    """8-bit codes taken from the two neighbours of a value, so that its mean is right."""

    codec: Blockwise

    def narrow(self, values: Tensor, stored: Sequence[Tensor], noise: Noise | None) -> None:
        self.codec.narrow(values, stored, None)
        if noise is None:
            return
        codes, scales = stored
        power, top = (2, 127.0) if self.codec.signed else (4, 255.0)
        scale = scales.repeat_interleave(256)[: values.numel()]
        shares = (values.abs() / torch.where(scale == 0, 1.0, scale)).nan_to_num()
        low = (shares ** (1 / power) * top).floor().clamp(max=top - 1)
        below, above = (low / top) ** power, ((low + 1) / top) ** power
        bits = torch.cat([added for _, _, added in noise.runs(values.numel())])
        chosen = low + ((shares - below) / (above - below) > bits / 65536)
        if self.codec.signed:
            codes.copy_(chosen.copysign(values))
        else:
            codes.copy_(chosen.clamp(min=1))


def narrowing_of(way: str, optimizer: torch.optim.Optimizer) -> tuple[Any, Narrowing]:
    """What ``wrap`` would learn, with the codecs of this bench in their places."""
    learnt, narrowing = learn(optimizer, STATE_DTYPES.get(way, "int8"))

    def other(codec: Codec) -> Codec:
        if way == "nearest" and isinstance(codec, Bfloat16):
            return Nearest(codec)
        if way == "int8-stochastic" and isinstance(codec, Blockwise):
            return Undecided(codec)
        return codec

    codecs = {p: {k: other(c) for k, c in of.items()} for p, of in narrowing.codecs.items()}
    return learnt, replace(narrowing, codecs=codecs)


def text() -> tuple[Any, data.Blocks, data.Blocks]:
    """Tokenizer, training blocks and held-out blocks of the standard library's source."""
    records = list(data.read_records(data.find_files(None)))
    tokenizer = train_tokenizer(records)
    blocks = data.pack(records, tokenizer, SEQ_LEN, 0)
    return tokenizer, *data.split(blocks, DataConfig(eval_fraction=0.02))


def llama(vocabulary: int) -> Any:
    """A Llama of 3.9 M parameters over 6144 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def loss_of(model: Any, blocks: data.Blocks, rows: list[int]) -> Tensor:
    """Mean loss, [], of some blocks."""
    ids = torch.from_numpy(blocks.input_ids(rows))
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: linear warm-up, then half a cosine down to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    done = (step - WARMUP) / max(steps - WARMUP, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def train(way: str, steps: int, lr: float, seed: int) -> dict[str, object]:
    """Train with one way to keep the moments; final losses and the curve."""
    tokenizer, learned, held = text()
    model = llama(len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    learnt, narrowing = narrowing_of(way, optimizer)
    ChunkedStep(optimizer, learnt, RamStore(optimizer, learnt), narrowing=narrowing)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: learning_rate(n, steps))
    order = torch.randperm(len(learned), generator=torch.Generator().manual_seed(seed)).tolist()
    losses, curve = [], {}
    for step in range(steps):
        rows = [order[(step * BATCH + i) % len(order)] for i in range(BATCH)]
        loss = loss_of(model, learned, rows)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % max(steps // 4, 1) == 0:
            curve[step + 1] = evaluate(model, held)
            print(f"{way:16} step {step + 1:5}: held out {curve[step + 1]:.4f}", flush=True)
    return {
        "question": "loss", "way": way, "steps": steps, "lr": lr, "seed": seed,
        "params": sum(p.numel() for p in model.parameters()),
        "train_loss": statistics.mean(losses[-max(steps // 20, 1) :]), "held_out_loss": curve,
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, held: data.Blocks) -> float:
    """Mean loss of up to 256 held-out blocks."""
    usable = range(0, min(len(held), 256) - BATCH + 1, BATCH)
    return statistics.mean(loss_of(model, held, list(range(i, i + BATCH))).item() for i in usable)


def moved(way: str, budget_bytes: int) -> dict[str, object]:
    """Bytes per step of a managed run that does not fit."""
    model = llama(6144)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        offload.wrap(
            model, optimizer, host_memory=budget_bytes, disk=folder,
            state_dtype=STATE_DTYPES[way], tuning=Tuning(chunk_bytes=MIB),
        )  # fmt: skip
        with offload.runtime(model) as run:
            for _ in range(6):
                ids = torch.randint(0, 6144, (1, 16))
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            stats = run.stats()
    params = sum(p.numel() for p in model.parameters())
    return {
        "question": "bytes", "way": way, "params": params, "budget_bytes": budget_bytes,
        **{f"{k}_bytes_per_param": v / params for k, v in stats["step_bytes"].items()},
        "disk_bytes_per_param": stats["tiers"]["disk"]["used_bytes"] / params,
    }  # fmt: skip


def timed(flags: dict[str, Any], elements: int, rounds: int) -> Iterator[dict[str, object]]:
    """Least seconds of the update with each way, in turns."""
    steps: dict[str, Callable[[], object]] = {}
    for way in ("float32", "bf16", "int8"):
        params = [nn.Parameter(torch.randn(1024, 1024)) for _ in range(elements >> 20)]
        for p in params:
            p.grad = torch.randn_like(p) * 1e-2
        optimizer = torch.optim.AdamW(params, **flags)
        learnt, narrowing = narrowing_of(way, optimizer)
        ChunkedStep(optimizer, learnt, RamStore(optimizer, learnt), narrowing=narrowing)
        optimizer.step()
        steps[way] = optimizer.step
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        for way, step in steps.items():
            began_s = time.perf_counter()
            step()
            times[way].append(time.perf_counter() - began_s)
    for way, taken in times.items():
        yield {
            "question": "time", "way": way, "flavour": next(iter(flags), "for-loop"),
            "params": elements, "ns_per_param": min(taken) / elements * 1e9,
        }  # fmt: skip


def note(row: dict[str, object]) -> None:
    """Show a result and append it."""
    print(row)
    line = {"torch": torch.__version__, "threads": torch.get_num_threads(), **row}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Answer one of the questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("question", choices=("loss", "bytes", "time"))
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--params", type=int, default=32 << 20)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--budget", type=int, default=20 * MIB)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.question == "loss":
        for way in args.ways:
            note(train(way, args.steps, args.lr, args.seed))
    elif args.question == "bytes":
        for way in (w for w in args.ways if w in ("float32", "bf16", "int8")):
            note(moved(way, args.budget))
    else:
        flavours: tuple[dict[str, Any], ...] = ({"fused": True}, {})
        for row in (row for flags in flavours for row in timed(flags, args.params, args.rounds)):
            note(row)


if __name__ == "__main__":
    main()
