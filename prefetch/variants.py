"""What a recorded step would take under other circumstances: planned anew, never run. Pure.

Savings are differences between two forecasts of the same trace, so that an error that both make
cancels. Costs a plan each: the caller asks for few of them where traces are long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from offload.prefetch.plan import Forecast
from offload.prefetch.planner import DoesNotFit, plan, smallest_bytes
from offload.prefetch.trace import Moment, Trace
from offload.tiers.spec import Machine

LONG_TRACE = 10_000  # uses of chunks: planning takes seconds from about here on
WORTH_SHARE = 0.05  # of a step; forecasts are not better than that


@dataclass(frozen=True, slots=True)
class Situation:
    """A recorded step, where it runs, and what its chunks and other memory may take."""

    trace: Trace
    machine: Machine
    capacity_bytes: int

    def forecast(self) -> Forecast | None:
        """Of its plan; None where it does not fit."""
        try:
            return plan(self.trace, self.machine, self.capacity_bytes).forecast
        except DoesNotFit:
            return None

    @property
    def is_long(self) -> bool:
        """Whether planning it takes seconds."""
        return sum(len(m.needs) for m in self.trace.moments) > LONG_TRACE

    @property
    def whole_bytes(self) -> int:
        """With so much nothing has to move."""
        used = {n.chunk for m in self.trace.moments for n in m.needs}
        other_bytes = max((m.other_bytes for m in self.trace.moments), default=0)
        return sum(self.trace.chunk_bytes[c] for c in used) + other_bytes


@dataclass(frozen=True, slots=True)
class Saving:
    """``change_bytes`` of capacity would change the step by so much."""

    change_bytes: int
    step_s: float
    saved_s: float


def more_memory(now: Situation, step_s: float) -> Saving | None:
    """The cheapest worthwhile addition to the budget; None where memory does not help.

    ``step_s``: what is predicted now. Worthwhile is what saves at least WORTH_SHARE of it; of
    several the one that saves most for each byte.
    """
    whole_bytes = now.whole_bytes
    lacking_bytes = whole_bytes - now.capacity_bytes
    if lacking_bytes <= 0:
        return None
    shares = (1.0,) if now.is_long else (0.125, 0.25, 0.5, 1.0)
    found = []
    for share in shares:
        change_bytes = int(lacking_bytes * share)
        more = replace(now, capacity_bytes=now.capacity_bytes + change_bytes).forecast()
        if more is not None and step_s - more.step_s > WORTH_SHARE * step_s:
            found.append(Saving(change_bytes, more.step_s, step_s - more.step_s))
    return max(found, key=lambda s: s.saved_s / s.change_bytes, default=None)


def less_memory(now: Situation, step_s: float) -> Saving | None:
    """The largest part of the budget that can be given up for nothing (WORTH_SHARE); None: none."""
    least_bytes = smallest_bytes(now.trace)
    useful_bytes = min(now.capacity_bytes, now.whole_bytes)
    best = None
    if useful_bytes < now.capacity_bytes:  # the rest was never used
        best = Saving(useful_bytes - now.capacity_bytes, step_s, 0.0)
    for share in () if now.is_long else (0.25, 0.5, 0.75):
        capacity_bytes = useful_bytes - int((useful_bytes - least_bytes) * share)
        less = replace(now, capacity_bytes=capacity_bytes).forecast()
        if less is None or less.step_s > (1 + WORTH_SHARE) * step_s:
            break
        best = Saving(capacity_bytes - now.capacity_bytes, less.step_s, step_s - less.step_s)
    return best


def with_chunks(now: Situation, chunks: Iterable[int], share: float) -> Situation:
    """These chunks take only this share of their bytes."""
    chosen = frozenset(chunks)
    sizes = tuple(
        max(int(b * share), 1) if c in chosen else b for c, b in enumerate(now.trace.chunk_bytes)
    )
    return replace(now, trace=replace(now.trace, chunk_bytes=sizes))


def without_chunks(now: Situation, chunks: Iterable[int]) -> Situation:
    """These chunks are never needed."""
    chosen = frozenset(chunks)
    moments = tuple(
        replace(m, needs=tuple(n for n in m.needs if n.chunk not in chosen))
        for m in now.trace.moments
    )
    dead = {c: at for c, at in now.trace.dead_after.items() if c not in chosen}
    return replace(now, trace=replace(now.trace, moments=moments, dead_after=dead))


def with_work(now: Situation, times: float, which: Callable[[Moment], bool]) -> Situation:
    """The moments of this kind compute so many times as long."""
    moments = tuple(
        replace(m, compute_s=m.compute_s * times) if which(m) else m for m in now.trace.moments
    )
    return replace(now, trace=replace(now.trace, moments=moments))


def with_costs(now: Situation, chunks: Iterable[int], s_per_byte: float) -> Situation:
    """Who updates these chunks computes so many seconds more for each of their bytes."""
    chosen, sizes = frozenset(chunks), now.trace.chunk_bytes
    moments = tuple(
        replace(m, compute_s=m.compute_s + s_per_byte * sum(
            sizes[n.chunk] for n in m.needs if n.chunk in chosen))
        for m in now.trace.moments
    )  # fmt: skip
    return replace(now, trace=replace(now.trace, moments=moments))
