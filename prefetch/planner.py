"""From one recorded step to a plan: what leaves and what is read ahead, moment by moment.

Three decisions, in this order. *Residency*: which chunks stay between uses, in the room that is
left after each moment's own needs and a reserve. *Dwell*: a chunk used in a backward pass stays one
more moment where there is room, since an operation may ask for its weights one by one. (In a
forward pass a module asks once, for all that it has, and room is better used to read ahead.)
*Reading ahead*: every other read is queued in the order of need, as early as the remaining room
allows. The reserve trades bytes moved against time to hide them in; several are tried in
simulation. Bytes are exact and times are not (one moment that was held up when it was recorded
looks like time to hide reads in), so a reserve may cost few bytes, whatever time it promises.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from offload.prefetch.bounds import IDLE, bound, drive_of
from offload.prefetch.plan import Forecast, Ops, Plan
from offload.prefetch.residency import Gaps, choose, find_gaps, spread, taken
from offload.prefetch.simulate import Replay, Timeline
from offload.prefetch.trace import Phase, Trace
from offload.prefetch.uses import Bools, Ints, Uses, find_uses
from offload.tiers.spec import Machine, format_size

_SAME_SHARE = 0.01  # recorded compute times differ by more from step to step
_BYTES_SHARE = 0.05  # that time may cost; it was worth 4% of a step at most (docs/log.md)
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
    return int(max(_held_bytes(trace, find_uses(trace)), default=0))


def plan(trace: Trace, machine: Machine, capacity_bytes: int) -> Plan:
    """The plan with (nearly) the least simulated step time of those that move (nearly) least.

    ``capacity_bytes`` is the fast tier's budget for chunks and for the trace's ``other_bytes``.
    Raises DoesNotFit for the first moment whose needs exceed it, ValueError for an empty trace.
    """
    if not trace.moments:
        raise ValueError("a trace without moments cannot be planned")
    uses = find_uses(trace)
    held = _held_bytes(trace, uses)
    least = int(held.max())
    if least > capacity_bytes:
        index = int(np.argmax(held > capacity_bytes))
        raise DoesNotFit(index, int(held[index]), capacity_bytes, least)
    gaps = find_gaps(trace, machine, uses)
    replay = Replay(trace, machine, capacity_bytes, uses)
    draft = _Draft(trace, machine, gaps, capacity_bytes - held, replay)
    unit, plans = int(uses.needed_bytes.max()), []
    chunk = int(np.median(trace.chunk_bytes)) if trace.chunk_bytes else 0
    for reserve in _reserves(unit, chunk, len(gaps.chunk), int((capacity_bytes - held).max())):
        plans.append(draft.plan(reserve))
        if _moved_bytes(plans[-1]) == 0:
            return plans[-1]  # all of it stays: no reserve can help
    best = _best(plans)
    if len(gaps.chunk) > _LARGE_TRACE:
        return best
    even = draft.plan(best.reserve_bytes, evenly=True)
    if _moved_bytes(even) < _moved_bytes(best) * (1 - _BYTES_SHARE):
        return even  # a moment that holds much leaves less room for what is all at one place
    gains = even.forecast.step_s < best.forecast.step_s * (1 - _SAME_SHARE)
    return even if gains and _moved_bytes(even) <= _moved_bytes(best) else best


@dataclass(frozen=True, slots=True)
class _Draft:
    """What all plans of one trace are made from. ``free_bytes``: beside each moment's own needs."""

    trace: Trace
    machine: Machine
    gaps: Gaps
    free_bytes: Ints
    replay: Replay

    def plan(self, reserve_bytes: int, *, evenly: bool = False) -> Plan:
        """The plan with this reserve; ``evenly``: with reads apart from each other."""
        room_bytes = np.maximum(self.free_bytes - reserve_bytes, 0)
        kept = choose(self.gaps, room_bytes)
        if evenly:
            kept = spread(self.gaps, room_bytes, kept)
        stays = _stays(self.trace, self.gaps, self.free_bytes, kept)
        ops, start = _operations(self.trace, self.gaps, stays)
        timeline = self.replay.run(ops, start)
        return Plan(ops, start, reserve_bytes, _forecast(
            self.trace, self.machine, reserve_bytes, self.gaps, stays, timeline
        ))  # fmt: skip


def stay(trace: Trace) -> Plan:
    """Where there is no tier below: nothing moves, and the step is its computing."""
    bound_s, wire_bound_s, binding = bound(IDLE, trace)
    step_s = bound_s + sum(m.handling_s for m in trace.moments)
    peak_bytes = max((m.other_bytes for m in trace.moments), default=0)
    forecast = Forecast(step_s, bound_s, wire_bound_s, 0.0, peak_bytes, 0, 0, binding)
    return Plan((Ops(),) * len(trace.moments), frozenset(), 0, forecast)


def _best(plans: list[Plan]) -> Plan:
    """Of the frugal plans the one that moves least and is, as far as anybody can tell, fastest."""
    least_bytes = min(map(_moved_bytes, plans))
    frugal = [p for p in plans if _moved_bytes(p) <= least_bytes * (1 + _BYTES_SHARE)]
    fastest_s = min(p.forecast.step_s for p in frugal)
    near = [p for p in frugal if p.forecast.step_s <= fastest_s * (1 + _SAME_SHARE)]
    return min(near, key=lambda p: (_moved_bytes(p), p.forecast.step_s))


def _moved_bytes(made: Plan) -> int:
    return made.forecast.moved_bytes


def _held_bytes(trace: Trace, uses: Uses) -> Ints:
    """For each moment, what it holds at least: its needs and what is not chunks."""
    return uses.needed_bytes + np.array([m.other_bytes for m in trace.moments], dtype=np.int64)


def _reserves(unit_bytes: int, chunk_bytes: int, uses: int, spare_bytes: int) -> list[int]:
    """Reserves to try, ascending: parts and multiples of what the hungriest moment needs.

    In whole chunks: half of one lets reads begin in pairs, just before they are wanted. One more
    than the least is often all that reading ahead wants.
    """
    factors: tuple[float, ...] = _RESERVES
    if uses > _LARGE_TRACE:
        factors = _ONE_RESERVE if uses > _HUGE_TRACE else _FEW_RESERVES
    tries = {-(-int(unit_bytes * f) // max(chunk_bytes, 1)) * chunk_bytes for f in factors}
    if uses <= _LARGE_TRACE:
        tries |= {chunk_bytes, 2 * chunk_bytes}
    return sorted({min(size_bytes, spare_bytes) for size_bytes in tries})


@dataclass(frozen=True, slots=True)
class _Stays:
    """For each gap: ``held`` moments in the fast tier after the use; what remains free.

    A gap with ``held < reach - 1`` ends with a drop in moment ``after + held + 1``: ``gone``.
    """

    held: Ints
    gone: Bools
    free: Ints


def _stays(trace: Trace, gaps: Gaps, free_bytes: Ints, kept: Bools) -> _Stays:
    """Of chosen gaps, with dwell."""
    count = len(trace.moments)
    held = np.where(kept, gaps.span, 0)
    first = (gaps.after + 1) % count
    load = taken(first, held, gaps.size_bytes, count).astype(np.int64)
    free: list[int] = (free_bytes - load).tolist()
    backward = np.array([m.phase is Phase.BACKWARD for m in trace.moments])
    short = np.flatnonzero((held == 0) & (gaps.reach > 1) & backward[gaps.after])
    stay = []
    for g, t, size in zip(*(c.tolist() for c in (short, first[short], gaps.size_bytes[short])),
                          strict=True):  # fmt: skip
        if free[t] >= size:
            free[t] -= size
            stay.append(g)
    held[stay] = 1
    return _Stays(held, held < gaps.reach - 1, np.array(free, dtype=np.int64))


def _operations(trace: Trace, gaps: Gaps, stays: _Stays) -> tuple[tuple[Ops, ...], frozenset[int]]:
    """Drops and loads of every moment, and what is there (or coming) before the first."""
    count = len(trace.moments)
    drops: list[list[int]] = [[] for _ in range(count)]
    loads: list[list[int]] = [[] for _ in range(count)]
    start = {need.chunk for need in trace.moments[-1].needs}
    gone = stays.gone
    out = gaps.after + stays.held + 1  # moment of the drop, counted on into the next lap
    for moment, chunk in zip((out[gone] % count).tolist(), gaps.chunk[gone].tolist(), strict=True):
        drops[moment].append(chunk)
    over_end = np.where(gone, out, gaps.after + gaps.reach) >= count
    start.update(gaps.chunk[over_end].tolist())
    chunks, queued = _read_ahead(gaps, stays, count)
    for moment, chunk in zip((queued % count).tolist(), chunks.tolist(), strict=True):
        loads[moment].append(chunk)
    start.update(chunks[queued < 0].tolist())
    ops = tuple(Ops(tuple(d), tuple(ls)) for d, ls in zip(drops, loads, strict=True))
    return ops, frozenset(start)


def _read_ahead(gaps: Gaps, stays: _Stays, count: int) -> tuple[Ints, Ints]:
    """(chunks to read, moment to queue each), in queue order; below zero: in the lap before.

    First come, first served: each read in the order of need goes as early as there is room
    from there to its need, but not before the one ahead of it. Moments before the lap's start
    are its end, so they are taken last, when the lap's own reads have been placed.

    Reads are queued and needed in one order, so in a moment before the need of read k those of
    the first k take room that are not needed until then. So read k can be queued behind the
    last moment whose room, with all that was needed up to it given back, is less than the first
    k together: no search, a look-up.
    """
    rows, due, floor = _reads(gaps, stays, count)
    size = gaps.size_bytes[rows]
    behind = np.cumsum(size)
    needed = np.cumsum(np.bincount(due, size, count)).astype(np.int64)
    queued = np.maximum(_behind_last_short(stays.free + needed, behind), np.maximum(floor, 0))
    queued = np.maximum.accumulate(queued)
    if len(queued):
        free = stays.free - taken(queued, due - queued, size, count).astype(np.int64)
        at_once = queued == 0  # the first ones: the lap before may have room
        floor = np.maximum(floor, np.maximum(due - count + 1, queued[-1] - count)) + count
        early = np.maximum(_behind_last_short(free, behind), floor)
        queued = np.where(at_once, np.minimum(np.maximum.accumulate(early) - count, 0), queued)
    order = np.argsort(queued % count, kind="stable")  # this lap's before the next's
    order = np.concatenate((order[queued[order] >= 0], order[queued[order] < 0]))
    return gaps.chunk[rows[order]], queued[order]


def _behind_last_short(free_bytes: Ints, size_bytes: Ints) -> Ints:
    """For each size (ascending), the moment after the last in which there is less room."""
    least = np.minimum.accumulate(free_bytes[::-1])[::-1]
    return np.searchsorted(least, size_bytes).astype(np.int64)


def _reads(gaps: Gaps, stays: _Stays, count: int) -> tuple[Ints, Ints, Ints]:
    """The gaps that end with a read, in the order of need; when it is due; its earliest moment."""
    rows = np.flatnonzero(stays.gone & gaps.reads)
    due = (gaps.after[rows] + gaps.reach[rows]) % count
    order = np.argsort(due, kind="stable")
    rows, due = rows[order], due[order]
    return rows, due, due - gaps.reach[rows] + stays.held[rows] + 2  # the moment after the drop


def _forecast(
    trace: Trace, machine: Machine, reserve_bytes: int, gaps: Gaps, stays: _Stays,
    timeline: Timeline,
) -> Forecast:  # fmt: skip
    """Bytes are counted for the phase that needs a read, and that last used what is written.

    Those of the plan: what is being written when the simulated step ends is not in its timeline.
    """
    fetched = np.flatnonzero(stays.gone & gaps.reads)
    due = (gaps.after[fetched] + gaps.reach[fetched]) % len(trace.moments)
    # What is written leaves after the first gap of its epoch in which it is away.
    away = np.flatnonzero(stays.held < gaps.span)
    epoch, first = np.unique(gaps.epoch_of()[away], return_index=True)
    left = away[first][gaps.write_s[epoch] > 0]
    reads = _per_phase(trace, due, gaps.size_bytes[fetched])
    writes = _per_phase(trace, gaps.after[left], gaps.size_bytes[left])
    drive = drive_of(machine, reads, writes, reserve_bytes)
    bound_s, wire_bound_s, binding = bound(drive, trace)
    return Forecast(
        step_s=timeline.step_s,
        bound_s=bound_s,
        wire_bound_s=wire_bound_s,
        stall_s=timeline.stall_s,
        peak_bytes=timeline.peak_bytes,
        read_bytes=sum(reads.values()),
        write_bytes=sum(writes.values()),
        binding=binding,
        drive=drive,
        phase_read_bytes=reads,
        phase_write_bytes=writes,
    )


def _per_phase(trace: Trace, moment: Ints, size_bytes: Ints) -> dict[Phase, int]:
    order = list(Phase)
    phase = np.array([order.index(m.phase) for m in trace.moments])[moment]
    total = np.bincount(phase, size_bytes, len(order)).astype(np.int64).tolist()
    return dict(zip(order, total, strict=True))
