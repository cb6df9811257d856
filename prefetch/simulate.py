"""Discrete-event replay of a plan: what a step would take, where it waits, what it holds.

Three lanes: compute, read, write. The last two share one drive, so each moves at its lone rate
while the other idles and at its joint rate while both run. A lane moves one chunk at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import compress, pairwise
from math import inf
from typing import NamedTuple

import numpy as np

from offload.prefetch.plan import Ops
from offload.prefetch.sharing import Sharing
from offload.prefetch.trace import Trace
from offload.prefetch.uses import Bools, Uses, deaths, find_uses
from offload.tiers.spec import Machine, format_size


class Deadlock(Exception):  # noqa: N818 (says what happened)
    """A moment's needs can never be met by these operations in this room."""


class Lane(StrEnum):
    """What runs at the same time."""

    COMPUTE = "compute"
    READ = "read"
    WRITE = "write"


class Interval(NamedTuple):
    """A lane at work. ``item``: the chunk moved or, on the compute lane, the moment.

    Seconds since the step began; a transfer begun in the step before starts below zero.
    """

    lane: Lane
    item: int
    start_s: float
    end_s: float


@dataclass(slots=True)
class Timeline:
    """One steady-state step. ``stalls_s[t]``: how long moment t waited before it could compute."""

    step_s: float = 0.0
    stalls_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    intervals: list[Interval] = field(default_factory=list)

    @property
    def stall_s(self) -> float:
        """Compute waiting for I/O, in all."""
        return sum(self.stalls_s)


def simulate(
    trace: Trace,
    machine: Machine,
    capacity_bytes: int,
    ops: Sequence[Ops],
    resident_at_start: frozenset[int],
    sharing: Sharing | None = None,
) -> Timeline:
    """Replay two steps of ``ops`` and report the second; see ``Replay``."""
    replay = Replay(trace, machine, capacity_bytes, find_uses(trace), sharing)
    return replay.run(ops, resident_at_start, intervals=True)


class _Transfer:
    """One direction of the drive: a chunk in flight, or none. Latency counts as bytes of work."""

    __slots__ = ("alone", "chunk", "latency", "left", "mixed", "started_s")

    def __init__(self, alone: float, mixed: float, latency_s: float) -> None:
        self.alone = alone
        self.mixed = mixed
        self.latency = latency_s * alone
        self.chunk = -1
        self.left = 0.0
        self.started_s = 0.0

    def start(self, chunk: int, size_bytes: int, now_s: float) -> None:
        self.chunk = chunk
        self.left = size_bytes + self.latency
        self.started_s = now_s


class _Drive:
    """Both directions and the clock."""

    def __init__(self, machine: Machine) -> None:
        wait_s = machine.disk_latency_s
        self.now_s = 0.0
        self.pace = 1.0
        self.read = _Transfer(machine.read_bytes_per_s, machine.mixed_read_bytes_per_s, wait_s)
        self.write = _Transfer(machine.write_bytes_per_s, machine.mixed_write_bytes_per_s, wait_s)

    def reset(self) -> None:
        """Both directions idle, the clock at zero."""
        self.now_s, self.read.chunk, self.write.chunk = 0.0, -1, -1

    def run(self, until_s: float) -> _Transfer | None:
        """Run until a transfer is done (and return it) or ``until_s`` is reached."""
        read, write = self.read, self.write
        both = read.chunk >= 0 and write.chunk >= 0
        pace = self.pace
        read_rate = (read.mixed if both else read.alone) * pace
        write_rate = (write.mixed if both else write.alone) * pace
        read_s = read.left / read_rate if read.chunk >= 0 else inf
        write_s = write.left / write_rate if write.chunk >= 0 else inf
        done: _Transfer | None
        done, pass_s = (read, read_s) if read_s <= write_s else (write, write_s)
        if self.now_s + pass_s > until_s or pass_s == inf:
            pass_s, done = until_s - self.now_s, None
            if pass_s <= 0.0:
                return None
        if pass_s != inf:
            left = read.left - pass_s * read_rate
            read.left = left if left > 0.0 else 0.0
            left = write.left - pass_s * write_rate
            write.left = left if left > 0.0 else 0.0
            self.now_s += pass_s
        return done


class _Tier:
    """What the fast tier holds: chunks there, coming and leaving all take room."""

    __slots__ = ("capacity_bytes", "dirty", "held_bytes", "leaving", "other_bytes", "resident")

    def __init__(self, capacity_bytes: int, chunks: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.resident = bytearray(chunks)  # 1: there
        self.dirty = bytearray(chunks)
        self.leaving: set[int] = set()
        self.held_bytes = 0
        self.other_bytes = 0


class _Step:
    """The trace by moments: the chunks each needs, those it overwrites, changes, and lets die."""

    __slots__ = ("changed", "dies", "fresh", "needed")

    def __init__(self, trace: Trace, uses: Uses) -> None:
        count, order = len(trace.moments), np.argsort(uses.moment, kind="stable")
        moment, chunk = uses.moment[order], uses.chunk[order]

        def rows(which: Bools) -> list[list[int]]:
            ends = np.searchsorted(moment[which], np.arange(count + 1)).tolist()
            chunks = chunk[which].tolist()
            return [chunks[a:b] for a, b in pairwise(ends)]

        self.needed = rows(np.ones(len(order), dtype=bool))
        self.fresh = rows(~uses.reads[order])
        self.changed = rows(uses.changes[order])
        self.dies: dict[int, list[int]] = {}
        for dead, at in deaths(trace, uses).items():
            self.dies.setdefault(at, []).append(dead)


class Replay:
    """The engine's rules for plans of one trace, in simulated time.

    ``capacity_bytes`` holds chunks (there, coming, or leaving until written) and the trace's
    ``other_bytes``. ``sharing``: where compute times were not recorded beside transfers; otherwise
    they are what they are there, and only the drive is the slower beside them.
    """

    def __init__(
        self, trace: Trace, machine: Machine, capacity_bytes: int, uses: Uses,
        sharing: Sharing | None = None,
    ) -> None:  # fmt: skip
        self.trace = trace
        self.sharing = sharing or Sharing(drive=machine.beside_share)
        self.step = _Step(trace, uses)
        self.tier = _Tier(capacity_bytes, 0)
        self.drive = _Drive(machine)
        self.to_read: deque[int] = deque()
        self.to_write: deque[int] = deque()
        self.missing: set[int] = set()  # what the moment waits for
        self.fresh: set[int] = set()  # of it, what waits for room and for nothing else
        self.line = Timeline()
        self.noting = False  # each transfer, in the timeline

    def run(
        self, ops: Sequence[Ops], resident: frozenset[int], *, intervals: bool = False
    ) -> Timeline:
        """One steady-state step, its clock beginning at zero; its transfers end in it.

        Before it as much of a step is replayed as refills the fast tier twice. Raises Deadlock
        where a moment would wait for ever, and where an operation does not fit the state it
        meets (a drop of what is not there).
        """
        begin = self._skip(ops, resident)
        self._lap(ops, begin, intervals=False)
        for lane in (self.drive.read, self.drive.write):
            lane.started_s -= self.drive.now_s
        self.drive.now_s = 0.0
        return self._lap(ops, 0, intervals=intervals)

    def _skip(self, ops: Sequence[Ops], resident: frozenset[int]) -> int:
        """Start at a moment from which enough is moved, all before it done in no time."""
        size, step, count = self.trace.chunk_bytes, self.step, len(ops)
        tier = self.tier = _Tier(self.tier.capacity_bytes, len(size))
        self.drive.reset()
        self.to_read.clear()
        self.to_write.clear()
        there, dirty, begin, moved_bytes = tier.resident, tier.dirty, count, 0
        while begin > 0 and moved_bytes < 2 * tier.capacity_bytes:
            begin -= 1
            moved_bytes += sum(size[c] for c in ops[begin].loads)
        for c in resident:
            there[c] = 1
        for t in range(begin):
            for c in ops[t].drops:
                there[c] = dirty[c] = 0
            for c in (*ops[t].loads, *step.fresh[t]):
                there[c] = 1
            for c in step.changed[t]:
                dirty[c] = 1
            for c in step.dies.get(t, ()):
                dirty[c] = 0
        tier.held_bytes = sum(compress(size, there))
        return begin

    def _lap(self, ops: Sequence[Ops], begin: int, *, intervals: bool) -> Timeline:
        line = self.line = Timeline()
        self.noting = intervals
        for t in range(begin, len(ops)):
            self._enter(t, ops[t])
            self._compute(t)
        line.step_s = self.drive.now_s
        return line

    def _enter(self, t: int, ops: Ops) -> None:
        """Issue the operations of moment t, then wait for what it needs."""
        tier, drive = self.tier, self.drive
        there, began_s = tier.resident, drive.now_s
        for chunk in ops.drops:
            self._drop(chunk, t)
        tier.other_bytes = self.trace.moments[t].other_bytes
        self.to_read.extend(ops.loads)
        self.missing = missing = {c for c in self.step.needed[t] if not there[c]}
        self.fresh = missing.intersection(self.step.fresh[t]) if missing else missing
        self._start()
        while missing or tier.held_bytes + tier.other_bytes > tier.capacity_bytes:
            done = drive.run(inf)
            if done is None:
                raise Deadlock(self._why(t, missing))
            self._finish(done)
        self.line.stalls_s.append(drive.now_s - began_s)

    def _compute(self, t: int) -> None:
        tier, drive, line = self.tier, self.drive, self.line
        for chunk in self.step.changed[t]:
            tier.dirty[chunk] = 1
        line.peak_bytes = max(line.peak_bytes, tier.held_bytes + tier.other_bytes)
        work_s = self.trace.moments[t].compute_s + self.trace.moments[t].handling_s
        if work_s > 0:
            began_s = drive.now_s
            self._work(work_s)
            if self.noting:
                line.intervals.append(Interval(Lane.COMPUTE, t, began_s, drive.now_s))
        for chunk in self.step.dies.get(t, ()):
            tier.dirty[chunk] = 0

    def _work(self, left_s: float) -> None:
        """Compute for so many lone seconds; what is being moved meanwhile goes on."""
        drive, (pace, drive.pace) = self.drive, self.sharing
        while True:
            began_s, shared = drive.now_s, drive.read.chunk >= 0 or drive.write.chunk >= 0
            own = pace if shared else 1.0
            done = drive.run(began_s + left_s / own)
            if done is None:
                break
            left_s -= (drive.now_s - began_s) * own
            self._finish(done)
        drive.pace = 1.0

    def _drop(self, chunk: int, t: int) -> None:
        tier = self.tier
        if not tier.resident[chunk]:
            raise Deadlock(f"moment {t} drops chunk {chunk}, which is not in the fast tier")
        tier.resident[chunk] = 0
        if tier.dirty[chunk]:
            tier.dirty[chunk] = 0
            tier.leaving.add(chunk)
            self.to_write.append(chunk)
        else:
            tier.held_bytes -= self.trace.chunk_bytes[chunk]

    def _start(self) -> None:
        """Begin whatever can begin: a fresh chunk before a read, since a moment waits for it."""
        tier, drive, size = self.tier, self.drive, self.trace.chunk_bytes
        room = tier.capacity_bytes - tier.held_bytes - tier.other_bytes
        if self.fresh:
            for chunk in sorted(self.fresh - tier.leaving):
                if room >= size[chunk]:
                    self.fresh.discard(chunk)
                    self.missing.discard(chunk)
                    tier.resident[chunk] = 1
                    tier.held_bytes += size[chunk]
                    room -= size[chunk]
        to_read = self.to_read
        if drive.write.chunk < 0 and self.to_write:
            chunk = self.to_write.popleft()
            drive.write.start(chunk, size[chunk], drive.now_s)
        while to_read and tier.resident[to_read[0]]:
            to_read.popleft()
        if drive.read.chunk < 0 and to_read and not self.fresh:
            chunk = to_read[0]
            if room >= size[chunk] and chunk not in tier.leaving:
                to_read.popleft()
                tier.held_bytes += size[chunk]
                room -= size[chunk]
                drive.read.start(chunk, size[chunk], drive.now_s)
        if room >= 0:
            line, held_bytes = self.line, tier.capacity_bytes - room
            if held_bytes > line.peak_bytes:
                line.peak_bytes = held_bytes

    def _finish(self, done: _Transfer) -> None:
        tier, chunk, line = self.tier, done.chunk, self.line
        size_bytes = self.trace.chunk_bytes[chunk]
        reading = done is self.drive.read
        if reading:
            tier.resident[chunk] = 1
            self.missing.discard(chunk)
            line.read_bytes += size_bytes
        else:
            tier.leaving.discard(chunk)
            tier.held_bytes -= size_bytes
            line.write_bytes += size_bytes
        if self.noting:
            lane = Lane.READ if reading else Lane.WRITE
            line.intervals.append(Interval(lane, chunk, done.started_s, self.drive.now_s))
        done.chunk = -1
        self._start()

    def _why(self, t: int, absent: set[int]) -> str:
        tier = self.tier
        return (
            f"moment {t} waits for ever for chunks {sorted(absent)[:8]}: "
            f"{format_size(tier.held_bytes)} of chunks and {format_size(tier.other_bytes)} of "
            f"other memory in {format_size(tier.capacity_bytes)}, reads queued: "
            f"{list(self.to_read)[:8]}"
        )
