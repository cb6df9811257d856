"""What managing layers costs beside their products: measured with a few of them, managed.

Hooks, chunks put in place and dropped, workers that wake, pages that were just read and are in no
cache; and of a pass: rows, masks, sampling, the step's begin and end. No probe of a part shows
their sum, so a sample generates in half the memory that it would take, as the run will. What it
waits for the disk is left out: so small a sample has too little room to read ahead in.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from offload.blockroom import largest_unit_bytes
from offload.config import Tuning
from offload.places import BlockPlan
from offload.quantised import scratch_bytes
from offload.shape import layers_of
from offload.tiers.spec import MIB

if TYPE_CHECKING:
    from offload.block import BlockStep
    from offload.run import Runtime

ROOM_BYTES = 4 * MIB  # beside weights: keys and values, activations
SETTLED = 8  # passes: recorded, on demand, or tried without reading ahead
LEAST, MOST = 16, 48  # passes beyond these
WITHIN_S = 6.0


class Handling(NamedTuple):
    """Seconds for each layer that weights come to and leave, and of a pass whatever its layers;
    and of the sample's layers, not managed, in the same moments.
    """

    layer_s: float
    pass_s: float
    plain_s: float


class Pass(NamedTuple):
    """One pass: seconds in all, between the first layer's begin and the last one's end, and of
    these waiting; bytes that were read; and seconds of the same layers, not managed, right after.
    """

    step_s: float
    layers_s: float
    stall_s: float
    read_bytes: int
    plain_s: float


class Stopwatch:
    """The latest pass through a model's layers, between its ends."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.began_s = self.ended_s = 0.0
        layers[0].register_forward_pre_hook(self._begin)
        layers[-1].register_forward_hook(self._end)

    @property
    def taken_s(self) -> float:
        """Seconds."""
        return self.ended_s - self.began_s

    def _begin(self, *_: object) -> None:
        self.began_s = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.ended_s = time.perf_counter()


def handling(
    plain: nn.Module, factory: Callable[[], nn.Module], once: Callable[[nn.Module], object],
    folder: Path, tuning: Tuning, drag: float,
) -> Handling:  # fmt: skip
    """Of a sample of layers, and of one like it, which is managed and never whole in memory.

    ``factory`` makes the other. ``once``: a pass of one token. ``tuning``: chunks like the run's,
    rates of the disk. ``drag``: as in `Compute`: the formula has that already. Raises SpillError
    where ``folder`` has no room.
    """
    from offload.api import init
    from offload.handle import runtime

    watch = Stopwatch(layers_of(plain))

    def plain_s() -> float:
        once(plain)
        return watch.taken_s

    alone_s = statistics.median(plain_s() for _ in range(3))
    passes = SETTLED + min(max(int(WITHIN_S / (3 * alone_s)), LEAST), MOST)
    managed = init(factory, host_memory=_budget_bytes(plain), disk=folder, tuning=tuning)
    inside = Stopwatch(layers_of(managed))
    with runtime(managed) as run:
        found = _generated(run, passes, inside, plain_s)
    assert tuning.machine is not None
    return beside(found, len(layers_of(plain)), drag / tuning.machine.read_bytes_per_s)


def beside(passes: list[Pass], layers: int, drag_s: float) -> Handling:
    """What is left of passes without products, waits and ``drag_s`` for each byte that is read.

    Never negative: what is compared are two moments.
    """
    layers_s = statistics.median(
        p.layers_s - p.stall_s - p.read_bytes * drag_s - p.plain_s for p in passes
    )
    rest_s = statistics.median(p.step_s - p.layers_s for p in passes)
    plain_s = statistics.median(p.plain_s for p in passes)
    return Handling(max(layers_s, 0.0) / layers, max(rest_s, 0.0), plain_s)


def _budget_bytes(model: nn.Module) -> int:
    """About half of what it holds, and what a pass needs."""
    stored = (*model.parameters(), *model.buffers())
    half_bytes = sum(t.numel() * t.element_size() for t in stored) // 2
    return half_bytes + largest_unit_bytes(model) + scratch_bytes(model) + ROOM_BYTES


def _generated(
    run: Runtime, passes: int, inside: Stopwatch, plain_s: Callable[[], float]
) -> list[Pass]:
    """Passes of one token of one row, by turns with plain ones: the machine has its moods."""
    found: list[Pass] = []
    engine = run.parts.engine
    meter = engine.space.lanes["read"].meter
    before = [0.0, 0]  # stalled so far, read so far

    def note(step: BlockStep) -> None:
        now = engine.counters.stalled_s(below=False), meter.moved_bytes
        stall_s, read_bytes = now[0] - before[0], int(now[1] - before[1])
        before[:] = now
        found.append(Pass(step.step_s, inside.taken_s, stall_s, read_bytes, plain_s()))

    run.generate([[1]], passes, plan=BlockPlan(1), on_step=note)
    return found[SETTLED:]
