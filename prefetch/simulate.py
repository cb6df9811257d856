"""Discrete-event replay of a plan: what a step would take, where it waits, what it holds.

Three lanes: compute, read, write. The last two share one drive, so each moves at its lone rate
while the other idles and at its joint rate while both run. A lane moves one chunk at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import NamedTuple

from offload.prefetch.plan import Ops
from offload.prefetch.residency import accesses, deaths
from offload.prefetch.trace import Access, Phase, Trace
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
) -> Timeline:
    """Replay two steps of ``ops`` and report the second.

    ``capacity_bytes`` holds chunks (there, coming, or leaving until written) and the trace's
    ``other_bytes``. Raises Deadlock where a moment would wait for ever, and where an operation
    does not fit the state it meets (a drop of what is not there).
    """
    replay = _Replay(trace, machine, capacity_bytes, ops, resident_at_start)
    replay.lap()
    return replay.lap()


def bound(
    trace: Trace,
    machine: Machine,
    read_bytes: Mapping[Phase, int],
    write_bytes: Mapping[Phase, int],
) -> tuple[float, float, str]:
    """(bound_s, wire_bound_s, binding) of a step that moves these bytes for each phase.

    Forward and backward pass with their updates form one group, the update the other: what a
    group needs cannot be asked for behind the barrier between them. ``bound_s`` sums the slower
    of drive and compute over the groups; ``wire_bound_s`` takes it once over the whole step;
    ``binding``, "disk" or "compute", has the larger part of ``bound_s``. Latencies are left out.
    """
    bound_s, disk_part_s, compute_all_s = 0.0, 0.0, 0.0
    for group in ((Phase.FORWARD, Phase.BACKWARD, Phase.EARLY), (Phase.UPDATE,)):
        reads = sum(read_bytes.get(phase, 0) for phase in group)
        writes = sum(write_bytes.get(phase, 0) for phase in group)
        disk_s = machine.disk_s(reads, writes)
        compute_s = sum(m.compute_s for m in trace.moments if m.phase in group)
        bound_s += max(disk_s, compute_s)
        disk_part_s += disk_s if disk_s > compute_s else 0.0
        compute_all_s += compute_s
    disk_all_s = machine.disk_s(sum(read_bytes.values()), sum(write_bytes.values()))
    binding = "disk" if disk_part_s > bound_s / 2 else "compute"
    return bound_s, max(disk_all_s, compute_all_s), binding


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
        self.read = _Transfer(machine.read_bytes_per_s, machine.mixed_read_bytes_per_s, wait_s)
        self.write = _Transfer(machine.write_bytes_per_s, machine.mixed_write_bytes_per_s, wait_s)

    def run(self, until_s: float) -> _Transfer | None:
        """Run until a transfer is done (and return it) or ``until_s`` is reached."""
        read, write = self.read, self.write
        both = read.chunk >= 0 and write.chunk >= 0
        read_rate = read.mixed if both else read.alone
        write_rate = write.mixed if both else write.alone
        read_s = read.left / read_rate if read.chunk >= 0 else inf
        write_s = write.left / write_rate if write.chunk >= 0 else inf
        done: _Transfer | None = read if read_s <= write_s else write
        pass_s = min(read_s, write_s)
        if self.now_s + pass_s > until_s or pass_s == inf:
            pass_s, done = max(until_s - self.now_s, 0.0), None
        read.left = max(read.left - pass_s * read_rate, 0.0)
        write.left = max(write.left - pass_s * write_rate, 0.0)
        self.now_s += pass_s
        return done


class _Tier:
    """What the fast tier holds: chunks there, coming and leaving all take room."""

    __slots__ = ("capacity_bytes", "dirty", "held_bytes", "leaving", "other_bytes", "resident")

    def __init__(self, capacity_bytes: int, resident: frozenset[int], held_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.resident = set(resident)
        self.dirty: set[int] = set()
        self.leaving: set[int] = set()
        self.held_bytes = held_bytes
        self.other_bytes = 0

    def has_room(self, size_bytes: int) -> bool:
        return self.held_bytes + self.other_bytes + size_bytes <= self.capacity_bytes


class _Replay:
    """The engine's rules for one plan, in simulated time."""

    def __init__(
        self,
        trace: Trace,
        machine: Machine,
        capacity_bytes: int,
        ops: Sequence[Ops],
        resident: frozenset[int],
    ) -> None:
        self.trace = trace
        self.ops = ops
        held = sum(trace.chunk_bytes[c] for c in resident)
        self.tier = _Tier(capacity_bytes, resident, held)
        self.drive = _Drive(machine)
        self.to_read: deque[int] = deque()
        self.to_write: deque[int] = deque()
        self.fresh: set[int] = set()  # chunks that wait for room, and for nothing else
        self.line = Timeline()
        self.dies: dict[int, list[int]] = {}
        for chunk, moment in deaths(trace, accesses(trace)).items():
            self.dies.setdefault(moment, []).append(chunk)

    def lap(self) -> Timeline:
        """One step, its clock beginning at zero; its transfers are those that end in it."""
        drive, self.line = self.drive, Timeline()
        for lane in (drive.read, drive.write):
            lane.started_s -= drive.now_s
        drive.now_s = 0.0
        for t in range(len(self.trace.moments)):
            self._enter(t)
            self._compute(t)
        self.line.step_s = drive.now_s
        return self.line

    def _enter(self, t: int) -> None:
        """Issue the operations of moment t, then wait for what it needs."""
        tier, moment, began_s = self.tier, self.trace.moments[t], self.drive.now_s
        for chunk in self.ops[t].drops:
            self._drop(chunk, t)
        tier.other_bytes = moment.other_bytes
        self.to_read.extend(self.ops[t].loads)
        absent = {n.chunk for n in moment.needs if n.chunk not in tier.resident}
        first = {n.chunk: n.access for n in reversed(moment.needs)} if absent else {}
        self.fresh = {c for c in absent if first[c] is Access.FRESH}
        self._start()
        while not (absent <= tier.resident and tier.has_room(0)):
            done = self.drive.run(inf)
            if done is None:
                raise Deadlock(self._why(t, absent - tier.resident))
            self._finish(done)
        self.line.stalls_s.append(self.drive.now_s - began_s)

    def _compute(self, t: int) -> None:
        moment, tier, drive = self.trace.moments[t], self.tier, self.drive
        tier.dirty.update(n.chunk for n in moment.needs if n.access is not Access.READ)
        began_s = drive.now_s
        end_s = began_s + moment.compute_s
        self._note_peak()
        while (done := drive.run(end_s)) is not None:
            self._finish(done)
        if moment.compute_s > 0:
            self.line.intervals.append(Interval(Lane.COMPUTE, t, began_s, end_s))
        tier.dirty.difference_update(self.dies.get(t, ()))

    def _drop(self, chunk: int, t: int) -> None:
        tier = self.tier
        if chunk not in tier.resident:
            raise Deadlock(f"moment {t} drops chunk {chunk}, which is not in the fast tier")
        tier.resident.discard(chunk)
        if chunk in tier.dirty:
            tier.dirty.discard(chunk)
            tier.leaving.add(chunk)
            self.to_write.append(chunk)
        else:
            tier.held_bytes -= self.trace.chunk_bytes[chunk]

    def _start(self) -> None:
        """Begin whatever can begin: a fresh chunk before a read, since a moment waits for it."""
        tier, drive, size = self.tier, self.drive, self.trace.chunk_bytes
        for chunk in sorted(self.fresh - tier.leaving) if self.fresh else ():
            if tier.has_room(size[chunk]):
                self.fresh.discard(chunk)
                tier.resident.add(chunk)
                tier.held_bytes += size[chunk]
        if drive.write.chunk < 0 and self.to_write:
            chunk = self.to_write.popleft()
            drive.write.start(chunk, size[chunk], drive.now_s)
        while self.to_read and self.to_read[0] in tier.resident:
            self.to_read.popleft()
        if drive.read.chunk < 0 and self.to_read and not self.fresh:
            chunk = self.to_read[0]
            if chunk not in tier.leaving and tier.has_room(size[chunk]):
                self.to_read.popleft()
                tier.held_bytes += size[chunk]
                drive.read.start(chunk, size[chunk], drive.now_s)
        if tier.has_room(0):
            self._note_peak()

    def _finish(self, done: _Transfer) -> None:
        tier, chunk, line = self.tier, done.chunk, self.line
        size = self.trace.chunk_bytes[chunk]
        if done is self.drive.read:
            tier.resident.add(chunk)
            line.read_bytes += size
            lane = Lane.READ
        else:
            tier.leaving.discard(chunk)
            tier.held_bytes -= size
            line.write_bytes += size
            lane = Lane.WRITE
        line.intervals.append(Interval(lane, chunk, done.started_s, self.drive.now_s))
        done.chunk = -1
        self._start()

    def _note_peak(self) -> None:
        held = self.tier.held_bytes + self.tier.other_bytes
        self.line.peak_bytes = max(self.line.peak_bytes, held)

    def _why(self, t: int, absent: set[int]) -> str:
        tier = self.tier
        return (
            f"moment {t} waits for ever for chunks {sorted(absent)[:8]}: "
            f"{format_size(tier.held_bytes)} of chunks and {format_size(tier.other_bytes)} of "
            f"other memory in {format_size(tier.capacity_bytes)}, reads queued: "
            f"{list(self.to_read)[:8]}"
        )
