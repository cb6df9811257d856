"""What the programs of this folder share: shapes, models made fast, caps, clocks, rows."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gpu.fits import Stays, given_bytes, given_host_bytes, need
from gpu.runner import line
from gpu.shapes import GB, TINY, Shape, memory_bytes, named
from torch import nn

Step = Callable[[], Any]

PATTERN = 1 << 20  # elements that weights repeat: random numbers for billions take minutes
WARM_STEPS, STEPS = 6, 5  # recorded, twice; replayed while moments are timed; then counted
SHORT_STEPS = 3  # counted, of a short run


def arguments(*ways: str) -> argparse.Namespace:
    """What every program is told."""
    parser = argparse.ArgumentParser()
    if ways:
        parser.add_argument("way", choices=ways)
    parser.add_argument("--shape", default="1.3b")
    parser.add_argument("--cap", default="none", help="GB of device memory; none; quarter")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="layers are run again")
    parser.add_argument("--short", action="store_true", help="fewer steps, layers and tokens")
    parser.add_argument("--host-gb", type=float, help="what the host is taken to have")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--emulated", action="store_true")
    args = parser.parse_args()
    if args.emulated:
        args.tokens = min(args.tokens, 16)
    return args


def shape_of(args: argparse.Namespace) -> Shape:
    """The shape that was asked for; the largest is what full training of fits the host."""
    return TINY if args.emulated else named(args.shape, host_bytes(args))


def fill(model: nn.Module) -> nn.Module:
    """Weights as a new model has them, about, at the speed of memory."""
    pattern = torch.empty(PATTERN).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            flat = p.data.view(-1)
            if "norm" in name:
                flat.fill_(1.0 if name.endswith("weight") else 0.0)
                continue
            part = pattern.to(p.dtype)
            for begin in range(0, flat.numel(), PATTERN):
                flat[begin : begin + PATTERN] = part[: flat.numel() - begin]
    return model


def llama(shape: Shape, dtype: torch.dtype = torch.float32, positions: int = 65536) -> Any:
    """A Llama on the CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = shape.hidden // shape.head
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=positions, use_cache=False,
    )  # fmt: skip
    return fill(bare(lambda: LlamaForCausalLM(config), dtype)).train()


def bare(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A model of transformers' in this type, its weights undefined: drawing them takes minutes."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # earlier 5.x
        from transformers.modeling_utils import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            return make()
    finally:
        torch.set_default_dtype(before)


def cap_bytes(args: argparse.Namespace) -> int | None:
    """The cap in bytes, set for this process; None: all of the device."""
    if args.cap == "none":
        return None
    if args.emulated:
        return 4 << 20
    wanted = _needed_bytes(args) // 4 if args.cap == "quarter" else int(float(args.cap) * GB)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(wanted / total, 1.0))
    return wanted


def _needed_bytes(args: argparse.Namespace) -> int:
    """What the unwrapped run of the same has taken, in an earlier task of the same folder."""
    same = {"way": "plain", "shape": args.shape, "cap": "none",
            "tokens": args.batch * args.tokens, "checkpointing": args.checkpointing}  # fmt: skip
    with suppress(OSError, ValueError):
        for found in json.loads((args.out / "state.json").read_text()).values():
            for row in found["rows"]:
                if same.items() <= row.items():
                    return int(row["device_peak_bytes"])
    stays = Stays.INPUTS if args.checkpointing else Stays.ALL  # it was cut, say: by arithmetic
    return need(shape_of(args), args.batch * args.tokens, "plain", stays=stays).device_bytes


def placed(args: argparse.Namespace, cap: int | None) -> dict[str, Any]:
    """``wrap``'s words for the budgets. The host's: what is free is less while a model is there."""
    if args.emulated:
        return {"device": "emulated", "device_memory": cap or "64MiB", "host_memory": "64MiB"}
    where: dict[str, Any] = {"device": "cuda", "host_memory": given_host_bytes(host_bytes(args))}
    if cap is not None:
        where["device_memory"] = given_bytes("ours", cap)
    return where


def host_bytes(args: argparse.Namespace) -> int:
    """What this machine is taken to have."""
    return memory_bytes(args.host_gb)


def tokens_of(args: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """Ids [batch, tokens], the same for all contestants; on the CPU."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary, (args.batch, args.tokens), generator=generator)


def checkpointed(model: Any) -> None:
    """Run layers again in the backward pass, under either name that transformers has for it."""
    old = getattr(model, "gradient_checkpointing_enable", None)
    getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})


def stepper(model: Any, optimizer: Any, ids: torch.Tensor) -> Step:
    """The plain loop. The loss stays where it is, until the step is over."""

    def step() -> Any:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def synchronize() -> None:
    """Wait for the device, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], warm: int, count: int) -> tuple[list[float], list[float]]:
    """Seconds of each counted step, device included, and the losses of all."""
    seconds, losses = [], []
    for i in range(warm + count):
        synchronize()
        began_s = time.perf_counter()
        losses.append(float(step()))
        synchronize()
        if i >= warm:
            seconds.append(time.perf_counter() - began_s)
    return seconds, losses


def steps_of(args: argparse.Namespace) -> tuple[int, int]:
    """How many steps warm up, and how many are counted."""
    return WARM_STEPS, SHORT_STEPS if args.short else STEPS


def measured(args: argparse.Namespace, shape: Shape, seconds: Sequence[float],
             losses: Sequence[float]) -> dict[str, Any]:  # fmt: skip
    """A row: FLOPs are 6 for each parameter and token, with no padding in the batch."""
    step_s, tokens = statistics.median(seconds), args.batch * args.tokens
    return {
        "shape": args.shape, "parameters": shape.parameters, "cap": args.cap,
        "checkpointing": args.checkpointing, "tokens": tokens,
        "step_s": step_s, "steps_s": list(seconds),
        "tokens_per_s": tokens / step_s, "tflops": 6 * shape.parameters * tokens / step_s / 1e12,
        "losses": list(losses)[:4], **peaks(),
        "says": f"{step_s:.3f} s, {tokens / step_s:.0f} tokens/s",
    }  # fmt: skip


def peaks() -> dict[str, int]:
    """Peaks of this process: torch's allocator on the device, resident memory on the host."""
    status = Path("/proc/self/status").read_text().splitlines()
    host = next(int(x.split()[1]) << 10 for x in status if x.startswith("VmHWM"))
    if not torch.cuda.is_available():
        return {"host_peak_bytes": host, "device_peak_bytes": 0}
    return {
        "host_peak_bytes": host,
        "device_peak_bytes": torch.cuda.max_memory_allocated(),
        "device_reserved_bytes": torch.cuda.max_memory_reserved(),
        "cuda_retries": torch.cuda.memory_stats().get("num_alloc_retries", 0),
    }


def plain_stats(run: Any) -> dict[str, Any]:
    """What a run of ours says of itself, as far as a results file wants it."""
    stats = run.stats()
    told = ("step_s", "bound_s", "wire_bound_s", "binding", "tiers", "device", "lanes", "stall_s")
    known = stats["step_s"] and stats["bound_s"]
    over = stats["step_s"] / stats["bound_s"] if known else None
    return {k: stats[k] for k in told} | {"over_bound": over}


def write_reports(run: Any, args: argparse.Namespace, name: str) -> list[str]:
    """The memory profile and the trace of the last step; the page where its packages are."""
    folder, written = args.out / "reports", []
    folder.mkdir(parents=True, exist_ok=True)
    # Drawing the page takes longer than a tiny run, and has a test of its own.
    for ending in (".json", ".trace.json", *((".html",) if not args.emulated else ())):
        try:
            run.report(folder / f"{name}{ending}")
            written.append(f"{name}{ending}")
        except Exception as error:  # figures are worth more than their page
            line({"report": ending, "error": f"{type(error).__name__}: {error}"[:300]})
    return written
