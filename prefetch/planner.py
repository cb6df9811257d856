"""From one recorded step to a plan: what leaves and what is read ahead, moment by moment.

Three decisions, in this order. *Residency*: which chunks stay between uses, in the room that is
left after each moment's own needs and a reserve. *Dwell*: a chunk used in a pass stays one more
moment where there is room, since the operations that follow may still touch it. *Reading ahead*:
every other read is queued in the order of need, as early as the remaining room allows. The
reserve trades bytes moved against time to hide them in; several are tried in simulation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from offload.prefetch.plan import Forecast, Ops, Plan
from offload.prefetch.residency import Bools, Gaps, Ints, Room, choose, find_gaps, taken
from offload.prefetch.simulate import Timeline, bound, simulate
from offload.prefetch.trace import Moment, Phase, Trace
from offload.tiers.spec import Machine, format_size

_RESERVES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # times the largest needs of a moment
_FEW_RESERVES = (0.5, 2.0)
_ONE_RESERVE = (2.0,)
_LARGE_TRACE, _HUGE_TRACE = 10_000, 100_000  # uses of chunks; a try takes seconds on a huge one


class DoesNotFit(Exception):  # noqa: N818 (says what happened)
    """A moment needs more at once than the fast tier has.

    ``smallest_bytes`` is the least capacity with which the whole trace can be planned.
    """

    def __init__(
        self, moment: int, needed_bytes: int, capacity_bytes: int, smallest_bytes: int
    ) -> None:
        super().__init__(
            f"moment {moment} needs {format_size(needed_bytes)} at once and there are "
            f"{format_size(capacity_bytes)}; the smallest that works is "
            f"{format_size(smallest_bytes)} ({smallest_bytes} bytes)"
        )
        self.moment = moment
        self.needed_bytes = needed_bytes
        self.capacity_bytes = capacity_bytes
        self.smallest_bytes = smallest_bytes


def smallest_bytes(trace: Trace) -> int:
    """The least capacity with which ``plan`` succeeds."""
    return max((_needed(trace, moment) for moment in trace.moments), default=0)


def plan(trace: Trace, machine: Machine, capacity_bytes: int) -> Plan:
    """The plan with the least simulated step time of those tried.

    ``capacity_bytes`` is the fast tier's budget for chunks and for the trace's ``other_bytes``.
    Raises DoesNotFit for the first moment whose needs exceed it, ValueError for an empty trace.
    """
    if not trace.moments:
        raise ValueError("a trace without moments cannot be planned")
    least = smallest_bytes(trace)
    for index, moment in enumerate(trace.moments):
        if _needed(trace, moment) > capacity_bytes:
            raise DoesNotFit(index, _needed(trace, moment), capacity_bytes, least)
    gaps = find_gaps(trace, machine)
    plans = []
    for reserve in _reserves(trace, len(gaps.chunk), capacity_bytes - least):
        stays = _stays(trace, gaps, capacity_bytes, reserve)
        ops, start = _operations(trace, gaps, stays)
        timeline = simulate(trace, machine, capacity_bytes, ops, start)
        plans.append(Plan(ops, start, reserve, _forecast(trace, machine, gaps, stays, timeline)))
        if timeline.read_bytes + timeline.write_bytes == 0:
            break  # all of it stays: no reserve can help
    return min(plans, key=lambda p: (p.forecast.step_s, p.reserve_bytes))


def _needed(trace: Trace, moment: Moment) -> int:
    return _needs_bytes(trace, moment) + moment.other_bytes


def _needs_bytes(trace: Trace, moment: Moment) -> int:
    return sum(trace.chunk_bytes[c] for c in {n.chunk for n in moment.needs})


def _reserves(trace: Trace, uses: int, spare_bytes: int) -> list[int]:
    """Reserves to try, ascending: parts and multiples of what the hungriest moment needs."""
    unit = max(_needs_bytes(trace, m) for m in trace.moments)
    factors: tuple[float, ...] = _RESERVES
    if uses > _LARGE_TRACE:
        factors = _ONE_RESERVE if uses > _HUGE_TRACE else _FEW_RESERVES
    return sorted({min(int(unit * f), spare_bytes) for f in factors})


@dataclass(frozen=True, slots=True)
class _Stays:
    """For each gap: ``held`` moments in the fast tier after the use; what remains free.

    A gap with ``held < reach - 1`` ends with a drop in moment ``after + held + 1``.
    """

    held: Ints
    room: Room


def _stays(trace: Trace, gaps: Gaps, capacity_bytes: int, reserve_bytes: int) -> _Stays:
    """Residency and dwell."""
    moments = trace.moments
    free = np.array([capacity_bytes - _needed(trace, m) for m in moments], dtype=np.int64)
    kept = choose(gaps, free - reserve_bytes)
    held = np.where(kept, gaps.span, 0)
    first = gaps.after + 1
    room = Room(free - taken(first, held, gaps.size_bytes, len(moments)).astype(np.int64))
    for g in np.flatnonzero((held == 0) & (gaps.reach > 1)).tolist():
        # The engine itself runs an update's arithmetic: there, nothing reads on.
        at = int(first[g]), 1, int(gaps.size_bytes[g])
        if not moments[int(gaps.after[g])].phase.updates and room.fits(*at):
            room.take(*at)
            held[g] = 1
    return _Stays(held, room)


def _operations(trace: Trace, gaps: Gaps, stays: _Stays) -> tuple[tuple[Ops, ...], frozenset[int]]:
    """Drops and loads of every moment, and what is there (or coming) before the first."""
    count = len(trace.moments)
    drops: list[list[int]] = [[] for _ in range(count)]
    loads: list[list[int]] = [[] for _ in range(count)]
    start = {need.chunk for need in trace.moments[-1].needs}
    gone = stays.held < gaps.reach - 1
    out = gaps.after + stays.held + 1  # moment of the drop, counted on into the next lap
    for g in np.flatnonzero(gone).tolist():
        drops[out[g] % count].append(int(gaps.chunk[g]))
    over_end = np.where(gone, out, gaps.after + gaps.reach) >= count
    start.update(gaps.chunk[over_end & (gaps.after < count)].tolist())
    for chunk, moment in _read_ahead(gaps, stays, gone, count):
        loads[moment % count].append(chunk)
        if moment < 0:
            start.add(chunk)
    ops = tuple(Ops(tuple(d), tuple(ls)) for d, ls in zip(drops, loads, strict=True))
    return ops, frozenset(start)


@dataclass(slots=True)
class _Read:
    """A read: needed in moment ``due``, queued in ``queued``, never before ``floor``."""

    chunk: int
    size_bytes: int
    due: int
    floor: int
    queued: int = 0


def _read_ahead(gaps: Gaps, stays: _Stays, gone: Bools, count: int) -> Iterator[tuple[int, int]]:
    """Yield (chunk, moment to queue its read), in queue order; below zero: in the lap before.

    First come, first served: each read in the order of need goes as early as there is room
    from there to its need, but not before the one ahead of it. Moments before the lap's start
    are its end, so they are taken last, when the lap's own reads have been placed.
    """
    room, reads, last = stays.room, _reads(gaps, stays, gone, count), 0
    for read in reads:
        read.queued = room.back_from(read.due, max(last, read.floor, 0), read.size_bytes)
        room.take(read.queued, read.due - read.queued, read.size_bytes)
        last = read.queued
    early = last - count
    for read in reads:
        if read.queued > 0:
            break
        floor = max(early, read.floor, read.due - count + 1)
        if floor < 0:
            read.queued = room.back_from(count, floor + count, read.size_bytes) - count
            room.take(read.queued, -read.queued, read.size_bytes)
        early = read.queued
    ahead = sorted(reads, key=lambda r: r.queued % count)  # stable: this lap's before the next's
    late = [r for r in ahead if r.queued >= 0]
    yield from ((r.chunk, r.queued) for r in late)
    yield from ((r.chunk, r.queued) for r in ahead if r.queued < 0)


def _reads(gaps: Gaps, stays: _Stays, gone: Bools, count: int) -> list[_Read]:
    """The reads of a lap in the order of need."""
    due = (gaps.after + gaps.reach) % count
    floor = due - gaps.reach + stays.held + 2  # the moment after the drop
    rows = np.flatnonzero(gone & gaps.reads)
    rows = rows[np.argsort(due[rows], kind="stable")]
    columns = (gaps.chunk, gaps.size_bytes, due, floor)
    return [_Read(*row) for row in zip(*(c[rows].tolist() for c in columns), strict=True)]


def _forecast(
    trace: Trace, machine: Machine, gaps: Gaps, stays: _Stays, timeline: Timeline
) -> Forecast:
    """Bytes are counted for the phase that needs a read, and that last used what is written."""
    phases = [m.phase for m in trace.moments]
    count = len(phases)
    reads: Counter[Phase] = Counter()
    writes: Counter[Phase] = Counter()
    away = stays.held < gaps.span
    fetched = (stays.held < gaps.reach - 1) & gaps.reads
    for g in np.flatnonzero(fetched).tolist():
        reads[phases[(gaps.after[g] + gaps.reach[g]) % count]] += int(gaps.size_bytes[g])
    bounds = [*gaps.epoch_first.tolist(), len(away)]
    for e in np.flatnonzero(gaps.write_s > 0).tolist():
        first = next((g for g in range(bounds[e], bounds[e + 1]) if away[g]), None)
        if first is not None:
            writes[phases[gaps.after[first]]] += int(gaps.size_bytes[first])
    bound_s, wire_bound_s, binding = bound(trace, machine, reads, writes)
    return Forecast(
        step_s=timeline.step_s,
        bound_s=bound_s,
        wire_bound_s=wire_bound_s,
        stall_s=timeline.stall_s,
        peak_bytes=timeline.peak_bytes,
        read_bytes=timeline.read_bytes,
        write_bytes=timeline.write_bytes,
        binding=binding,
    )
