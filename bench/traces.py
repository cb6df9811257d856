"""How long does planning take? Traces of Llama-shaped steps, made by arithmetic, up to 405 B.

Weights, gradients and two optimizer states in fp32, laid out and cut as the runtime does it. In a
step each linear layer and norm is one moment of the forward pass; in the backward pass its weight
is one moment and every chunk of its gradient one more; in the update each chunk index is one.
The input embedding is looked up in place, so only its gradient and its update take moments.

Prints a table (median seconds of a plan, bytes moved over the independent minimum of traffic.py)
and appends JSON lines to results/planner.jsonl.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from traffic import minimum_bytes

from offload.prefetch.planner import plan
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.tiers.layout import Layout, lay_out
from offload.tiers.spec import GIB, MIB, Machine

ITEM_BYTES = 4
NVME = Machine(7e9, 5e9, 5e9, 4e9, 2e10)  # a data-centre drive, both directions at once


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's dimensions. ``tokens`` in a batch; ``flops_per_s`` of the machine that computes."""

    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    tokens: int = 4096
    flops_per_s: float = 4e14

    def numels(self) -> list[int]:
        """Elements of each parameter, in the order of the module tree."""
        h, layer = self.hidden, []
        layer += [h * h, h * self.kv_width, h * self.kv_width, h * h]
        layer += [h * self.intermediate] * 3 + [h, h]
        return [self.vocabulary * h, *layer * self.layers, h, self.vocabulary * h]

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(self.numels())


LLAMA_405B = Shape(126, 16384, 53248, 1024, 128256)
LLAMA_70B = Shape(80, 8192, 28672, 1024, 128256)
LLAMA_8B = Shape(32, 4096, 14336, 1024, 128256)


def training_step(shape: Shape, chunk_bytes: int) -> Trace:
    """Forward, backward and update of one micro-batch; gradients die at the end."""
    numels = shape.numels()
    layout = lay_out(numels, chunk_bytes // ITEM_BYTES)
    moments: list[Moment] = []
    saved_bytes = 0
    for i in range(1, len(numels)):
        saved_bytes += shape.tokens * shape.hidden * ITEM_BYTES // 8  # most is recomputed
        needs = tuple(Need(c, Access.READ) for c in layout.chunks_of(i))
        moments.append(Moment(Phase.FORWARD, needs, _compute_s(shape, numels[i]), saved_bytes))
    for i in reversed(range(len(numels))):
        moments += _backward(shape, layout, i, saved_bytes * i // len(numels))
    access = (Access.WRITE, Access.READ, Access.WRITE, Access.WRITE)
    for c in range(layout.chunks):
        needs = tuple(Need(kind * layout.chunks + c, a) for kind, a in enumerate(access))
        moments.append(Moment(Phase.UPDATE, needs, 7 * chunk_bytes / NVME.copy_bytes_per_s, 0))
    bounds = (layout.chunk_range(c) for c in range(layout.chunks))
    sizes = tuple((stop - start) * ITEM_BYTES for start, stop in bounds)
    gradients = range(layout.chunks, 2 * layout.chunks)
    return Trace(tuple(moments), sizes * 4, dict.fromkeys(gradients, len(moments) - 1))


def _backward(shape: Shape, layout: Layout, tensor: int, saved_bytes: int) -> list[Moment]:
    """A weight is used; then its gradient, so far autograd's own tensor, goes home by chunks."""
    chunks = layout.chunks_of(tensor)
    other_bytes = saved_bytes + layout.numels[tensor] * ITEM_BYTES
    moments = []
    if tensor > 0:
        needs = tuple(Need(c, Access.READ) for c in chunks)
        moments.append(
            Moment(Phase.BACKWARD, needs, 2 * _compute_s(shape, layout.numels[tensor]), other_bytes)
        )  # fmt: skip
    begun = layout.chunks_of(tensor + 1)[0] if tensor + 1 < len(layout.numels) else -1
    for c in reversed(chunks):
        access = Access.WRITE if c == begun else Access.FRESH
        needs = (Need(layout.chunks + c, access),)
        moments.append(Moment(Phase.BACKWARD, needs, 0.0, other_bytes))
    return moments


def _compute_s(shape: Shape, numel: int) -> float:
    return 2 * numel * shape.tokens / shape.flops_per_s


CASES = {  # shape, chunk bytes, capacity in bytes
    "8B, 16 GiB": (LLAMA_8B, 32 * MIB, 16 * GIB),
    "70B, 64 GiB": (LLAMA_70B, 32 * MIB, 64 * GIB),
    "405B, 64 GiB": (LLAMA_405B, 32 * MIB, 64 * GIB),
    "405B, 64 GiB, 64 MiB chunks": (LLAMA_405B, 64 * MIB, 64 * GIB),
    "405B, 512 GiB": (LLAMA_405B, 32 * MIB, 512 * GIB),
}


def measure(name: str, repeats: int = 3) -> dict[str, object]:
    """Plan one case some times."""
    shape, chunk_bytes, capacity_bytes = CASES[name]
    trace = training_step(shape, chunk_bytes)
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        made = plan(trace, NVME, capacity_bytes)
        seconds.append(time.perf_counter() - start_s)
    forecast = made.forecast
    moved_bytes = forecast.moved_bytes
    weights, table = shape.parameters * ITEM_BYTES, shape.numels()[0] * ITEM_BYTES
    least_bytes = minimum_bytes(weights, 2, capacity_bytes, table)
    return {
        "bench": "planner", "case": name, "parameters": shape.parameters,
        "moments": len(trace.moments), "uses": sum(len(m.needs) for m in trace.moments),
        "plan_s": statistics.median(seconds), "moved_bytes": moved_bytes,
        "over_minimum": moved_bytes / least_bytes,
        "step_over_bound": forecast.step_s / forecast.bound_s,
        "python": platform.python_version(), "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip


def main() -> None:
    print(f"{'case':30}{'uses':>9}{'plan s':>9}{'bytes/min':>11}{'step/bound':>12}")
    for name in CASES:
        line = measure(name)
        print(f"{name:30}{line['uses']:9}{line['plan_s']:9.2f}{line['over_minimum']:11.3f}"
              f"{line['step_over_bound']:12.3f}", flush=True)  # fmt: skip
        with (Path(__file__).parent / "results" / "planner.jsonl").open("a") as out:
            out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
