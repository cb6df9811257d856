"""What one step touched, moment by moment. Plain data: no torch, no I/O, no clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, StrEnum


class Access(Enum):
    """How a moment uses a chunk."""

    READ = "read"  # contents needed, left unchanged
    WRITE = "write"  # contents needed, then changed: the chunk is dirty afterwards
    FRESH = "fresh"  # contents wholly overwritten: nothing to load, dirty afterwards


class Phase(StrEnum):
    """Parts of a step. All but the update may overlap in I/O; that stands behind a barrier.

    EARLY is the update of what a backward pass has finished with, in the middle of that pass.
    """

    FORWARD = "forward"
    BACKWARD = "backward"
    EARLY = "early update"
    UPDATE = "update"

    @property
    def updates(self) -> bool:
        """Whether the engine itself does the arithmetic: no code of the user's runs meanwhile."""
        return self in (Phase.EARLY, Phase.UPDATE)

    @property
    def in_backward(self) -> bool:
        """Whether a backward pass is under way."""
        return self in (Phase.BACKWARD, Phase.EARLY)


@dataclass(frozen=True, slots=True)
class Need:
    """One chunk that must be in the fast tier during a moment."""

    chunk: int
    access: Access


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of the step where chunks are needed, and the work until the next moment.

    ``compute_s`` is the time the compute lane works between this moment's needs being met and
    the next moment. ``other_bytes`` is memory in the fast tier that is not chunks (saved
    activations, gradients on their way home) at its highest during this moment. ``handling_s``:
    what the engine itself took to meet the needs, waiting not counted.
    """

    phase: Phase
    needs: tuple[Need, ...]
    compute_s: float
    other_bytes: int
    handling_s: float = 0.0

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What identifies this moment when a later step is compared with the trace."""
        return self.phase, tuple(n.chunk for n in self.needs)


@dataclass(frozen=True, slots=True)
class Trace:
    """One step, cyclic: after the last moment comes the first one of the next step.

    ``chunk_bytes[c]`` is the size of chunk ``c``. ``dead_after[c]`` is the index of the moment
    after which chunk c's contents are known to be rubbish until its next FRESH access (a
    gradient after the user's zero_grad); such a chunk is dropped without a write.
    """

    moments: tuple[Moment, ...]
    chunk_bytes: tuple[int, ...]
    dead_after: dict[int, int]


def merged(a: Trace, b: Trace) -> Trace:
    """Two steps of the same moments as one: the lesser times, the greater memory."""
    moments = tuple(
        replace(n, compute_s=min(m.compute_s, n.compute_s),
                other_bytes=max(m.other_bytes, n.other_bytes))
        for m, n in zip(a.moments, b.moments, strict=True)
    )  # fmt: skip
    return replace(b, moments=moments)


def retimed(old: Trace, *seen: Trace) -> Trace:
    """A trace with the mean times of typical ones, and the memory of whichever saw most."""
    typical = _typical(seen)
    moments = tuple(
        replace(
            m, compute_s=statistics.mean([t.moments[i].compute_s for t in typical]),
            handling_s=statistics.mean([t.moments[i].handling_s for t in typical]),
            other_bytes=max(m.other_bytes, *(t.moments[i].other_bytes for t in seen)),
        )
        for i, m in enumerate(old.moments)
    )  # fmt: skip
    return replace(old, moments=moments)


def paced(trace: Trace, times: float) -> Trace:
    """A trace whose moments take so many times as long."""
    moments = tuple(
        replace(m, compute_s=m.compute_s * times, handling_s=m.handling_s * times)
        for m in trace.moments
    )
    return replace(trace, moments=moments)


def _typical(seen: Sequence[Trace]) -> Sequence[Trace]:
    """The middle half by length: single steps of a busy machine are off by a fifth and more.

    Whole steps, not moments: what interrupts a step hits a few of its moments, others each time,
    and would be left out of all of them.
    """
    cut = len(seen) // 4
    return sorted(seen, key=_busy_s)[cut : len(seen) - cut]


def _busy_s(trace: Trace) -> float:
    return sum(m.compute_s + m.handling_s for m in trace.moments)
