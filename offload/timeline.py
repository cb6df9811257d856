"""From a tape to a timeline: when the processor computed and for whom, and when it waited and why.

Whatever the loop does is one of three: it waits (noted as such), the engine works for it between
a moment's beginning and its end (moving pages, making room), or it computes. So computing is what
is left of the step, and all three together are the step.

[Note: for whom]
Forward: for the module that began last; what comes between two modules counts for the first.
Backward: for the module whose gradient arrives next, unless what was asked for holds none of its
weights (frozen ones have no gradients): then for the nearest of those whose weights it holds.
Update: for the module that owns most of the chunk of weights. -1: for nobody in particular.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from offload.prefetch.trace import Need, Phase
from offload.tape import Mark, Tape

ENGINE = "engine"  # the cause of a stall: the runtime's own work
UNKNOWN = -2

Interval = tuple[float, float]


class Owners(Protocol):
    """Who owns what: see report_tables.py."""

    index: dict[str, int]

    def module_of(self, parameter: str) -> int: ...
    def users(self, chunks: Iterable[int]) -> dict[int, int]: ...


@dataclass(slots=True)
class Segment:
    """A part of the loop's time. ``cause`` None: it computes; else why it does not."""

    start_s: float
    end_s: float
    cause: str | None = None
    chunk: int = -1
    phase: Phase = Phase.FORWARD
    module: int = UNKNOWN
    needed: tuple[int, ...] = ()  # chunks of the moment that it belongs to

    @property
    def lane(self) -> str:
        """Of the report."""
        if self.cause is not None:
            return "stalls"
        return "update" if self.phase.updates else "compute"


@dataclass(frozen=True, slots=True)
class Levels:
    """A step's tapes: the host's, and the device's with the host's chunks of each of its own."""

    host: Tape
    device: Tape | None = None
    under: Sequence[tuple[int, ...]] = ()

    def handling(self) -> list[Interval]:
        """When the engines worked or waited."""
        device = self.device.moments if self.device is not None else []
        return union((m[0], m[1]) for m in (*self.host.moments, *device))

    def moments(self) -> list[tuple[float, Phase, tuple[int, ...]]]:
        """When what was asked for, by the host's chunks.

        Below a device it is copies that ask the host, at any time: of those only updates count.
        """
        host, found = self.host.moments, []
        if self.device is not None:
            host = [m for m in host if m[2].updates]
            for start_s, _, phase, needs in self.device.moments:
                found.append((start_s, phase, self._below(_chunks(needs))))
        found += [(start_s, phase, _chunks(needs)) for start_s, _, phase, needs in host]
        return sorted(found, key=lambda m: m[0])

    def stalls(self) -> list[tuple[float, float, str, int]]:
        """Of both; those within others left out."""
        found = list(self.host.stalls)
        if self.device is not None:
            for start_s, end_s, cause, chunk in self.device.stalls:
                named = "upload" if cause == "read" else cause
                found.append((start_s, end_s, named, next(iter(self._below((chunk,))), -1)))
        whole: list[tuple[float, float, str, int]] = []
        for stall in sorted(found):
            if not whole or stall[0] >= whole[-1][1]:
                whole.append(stall)
        return whole

    def _below(self, chunks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(c for chunk in chunks if chunk >= 0 for c in self.under[chunk])


def segments(levels: Levels, owners: Owners) -> list[Segment]:
    """The whole step, in order, without gaps; seconds are the tape's."""
    tape = levels.host
    stalls = levels.stalls()
    idle = [Segment(*stall) for stall in stalls]
    within = [(start_s, end_s) for start_s, end_s, *_ in stalls]
    for start_s, end_s in levels.handling():
        idle += [Segment(a, b, ENGINE) for a, b in gaps(within, start_s, end_s)]
    idle = _clipped(sorted(idle, key=lambda s: s.start_s), tape.began_s, tape.ended_s)
    cuts = [mark[0] for mark in tape.marks]
    whole = idle + [
        Segment(a, b)
        for start_s, end_s in gaps([(s.start_s, s.end_s) for s in idle], tape.began_s, tape.ended_s)
        for a, b in _cut(start_s, end_s, cuts)
    ]
    whole.sort(key=lambda s: s.start_s)
    _Labels(owners).put(whole, levels.moments(), tape.marks)
    return whole


class _Labels:
    """Says of each segment in which phase it is, and for whom."""

    def __init__(self, owners: Owners) -> None:
        self.owners = owners
        self.phase = Phase.FORWARD
        self.module = -1
        self.needed: tuple[int, ...] = ()

    def put(
        self, whole: list[Segment],
        moments: list[tuple[float, Phase, tuple[int, ...]]],
        marks: list[tuple[float, Mark, str]],
    ) -> None:  # fmt: skip
        events: list[tuple[float, Phase | Mark, tuple[int, ...] | str]] = sorted(
            [*moments, *marks], key=lambda e: e[0]
        )
        at = 0
        for segment in whole:
            while at < len(events) and events[at][0] <= segment.start_s:
                self._take(*events[at][1:])
                at += 1
            segment.phase, segment.module, segment.needed = self.phase, self.module, self.needed
        self._backward(whole, marks)

    def _take(self, what: Phase | Mark, detail: tuple[int, ...] | str) -> None:
        if isinstance(what, Phase):
            assert isinstance(detail, tuple)
            self._moment(what, detail)
        elif what in (Mark.MODULE, Mark.RERUN):
            self.phase = Phase.FORWARD if what is Mark.MODULE else Phase.BACKWARD
            self.module, self.needed = self.owners.index.get(str(detail), -1), ()
        elif what is Mark.GRADIENT:
            self.phase, self.module, self.needed = Phase.BACKWARD, UNKNOWN, ()
        elif what is Mark.FORWARD_ENDS:
            self.phase, self.module, self.needed = Phase.BACKWARD, -1, ()
        elif self.phase is Phase.EARLY:
            self.phase, self.module, self.needed = Phase.BACKWARD, UNKNOWN, ()

    def _moment(self, phase: Phase, chunks: tuple[int, ...]) -> None:
        known = self.phase is phase and self.module in self.owners.users(chunks)
        self.phase, self.needed = phase, chunks
        if phase.updates:
            users = self.owners.users(chunks)
            self.module = max(users, key=lambda m: (users[m], -m), default=-1)
        elif phase is Phase.BACKWARD and not known:  # else its forward runs again
            self.module = UNKNOWN

    def _backward(self, whole: list[Segment], marks: list[tuple[float, Mark, str]]) -> None:
        """From the end: for whom the backward pass works shows when a gradient arrives."""
        arrivals = [(at_s, name) for at_s, mark, name in marks if mark is Mark.GRADIENT]
        left, coming = len(arrivals), -1
        for segment in reversed(whole):
            while left and arrivals[left - 1][0] >= segment.end_s:
                left -= 1
                coming = self.owners.module_of(arrivals[left][1])
            if segment.phase is not Phase.BACKWARD:
                coming = -1 if segment.phase is Phase.FORWARD else coming
            elif segment.module == UNKNOWN:
                segment.module = self._nearest(segment.needed, coming)

    def _nearest(self, chunks: tuple[int, ...], coming: int) -> int:
        users = self.owners.users(chunks)
        if not users or coming in users:
            return coming
        return min(users, key=lambda m: (m < coming, abs(m - coming)))


def gaps(taken: Sequence[Interval], start_s: float, end_s: float) -> Iterable[Interval]:
    """What is left of a time by these intervals, which are in order and do not overlap."""
    first = bisect_right(taken, start_s, key=lambda i: i[1])
    last = bisect_left(taken, end_s, key=lambda i: i[0])
    ends = [(start_s, start_s), *taken[first:last], (end_s, end_s)]
    return [(a[1], b[0]) for a, b in pairwise(ends) if b[0] > a[1]]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as intervals that do not overlap, in order."""
    whole: list[Interval] = []
    for start_s, end_s in sorted(intervals):
        if whole and start_s <= whole[-1][1]:
            whole[-1] = whole[-1][0], max(whole[-1][1], end_s)
        else:
            whole.append((start_s, end_s))
    return whole


def _cut(start_s: float, end_s: float, cuts: Sequence[float]) -> Iterable[Interval]:
    inside = cuts[bisect_right(cuts, start_s) : bisect_left(cuts, end_s)]
    return pairwise((start_s, *inside, end_s))


def _clipped(parts: list[Segment], start_s: float, end_s: float) -> list[Segment]:
    for part in parts:
        part.start_s, part.end_s = max(part.start_s, start_s), min(part.end_s, end_s)
    return [part for part in parts if part.end_s > part.start_s]


def _chunks(needs: Iterable[Need]) -> tuple[int, ...]:
    return tuple(need.chunk for need in needs)
