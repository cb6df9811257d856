"""The least time of a step: over phases that cannot overlap, the slowest resource of each, summed.

Nothing here knows a schedule: every resource is given the seconds that it needs by itself, at
measured rates, without latencies. Rates of what is shared are joint ones: those of the disk's two
directions, and that of the disk beside cores that compute. What moves over DRAM has no term of its
own: it is in the measured rates of copies and of the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from offload.prefetch.trace import Moment, Phase, Trace
from offload.tiers.spec import Machine

PASSES = (Phase.FORWARD, Phase.BACKWARD, Phase.EARLY)


class Limit(NamedTuple):
    """``bound_s`` keeps the barriers of the user's loop, ``wire_bound_s`` drops them.

    ``binding``: the resource that makes most of ``bound_s``: "disk", "compute" and, where a device
    computes, "link" (copies to it and from it) and "update" (the processor that updates).
    """

    bound_s: float
    wire_bound_s: float
    binding: str


class Drive(NamedTuple):
    """Seconds in which the drive alone moves what passes need, what the update needs, and both.

    ``spare_s``: what it moves in these may cross the barrier between them, since memory holds it.
    ``beside_share``: the part of its pace that it keeps while cores compute (``spec.Machine``).
    """

    passes_s: float = 0.0
    update_s: float = 0.0
    whole_s: float = 0.0
    spare_s: float = 0.0
    beside_share: float = 1.0

    def beside(self, passes_s: float, update_s: float) -> Drive:
        """What it needs of a step in which cores compute for so long in passes and update."""
        lost = 1.0 - self.beside_share
        return self._replace(
            passes_s=self.passes_s + lost * passes_s,
            update_s=self.update_s + lost * update_s,
            whole_s=self.whole_s + lost * (passes_s + update_s),
        )


class Pass(NamedTuple):
    """One forward or backward pass on a device. Seconds of copies up, and of computing."""

    phase: Phase
    up_bytes: float
    up_s: float
    work_s: float


IDLE = Drive()


@dataclass(frozen=True, slots=True)
class Framed:
    """The part of a step that a device computes, in frames that copies fill.

    ``trace``: its chunks are those of frames, of which ``up_bytes`` cross the bus; ``read_bytes``,
    in sizes of the trace: what its plan uploads. ``down_s``: seconds in which gradients come down.
    ``kept``: copies outlive a pass; otherwise each has to fetch what it touches. ``one_processor``:
    the device is an emulated one, on the cores that update.
    """

    trace: Trace
    up_bytes: Sequence[int]
    up_bytes_per_s: float
    read_bytes: int = 0
    down_s: float = 0.0
    kept: bool = False
    one_processor: bool = False


def drive_of(
    machine: Machine, read_bytes: Mapping[Phase, int], write_bytes: Mapping[Phase, int],
    spare_bytes: int = 0,
) -> Drive:  # fmt: skip
    """What the drive does for each phase, ``spare_bytes`` of it earlier or later."""
    passes_s, update_s, whole_s = (
        machine.disk_s(*(sum(b.get(p, 0) for p in group) for b in (read_bytes, write_bytes)))
        for group in (PASSES, (Phase.UPDATE,), tuple(Phase))
    )
    spare_s = machine.disk_s(spare_bytes, 0)
    return Drive(passes_s, update_s, whole_s, spare_s, machine.beside_share)


def bound(drive: Drive, trace: Trace) -> Limit:
    """Of a step that one processor computes and updates.

    Forward and backward pass with their updates form one group, the update the other, and the
    compute of one waits for the other's.
    """
    passes_s, update_s = (_compute_s(trace, p) for p in (PASSES, (Phase.UPDATE,)))
    return _limit(
        drive.beside(passes_s, update_s),
        {"compute": passes_s}, {"compute": update_s}, {"compute": passes_s + update_s},
    )  # fmt: skip


def framed_bound(drive: Drive, host: Trace, device: Framed) -> Limit:
    """Of a step that a device computes and the host updates (``host``: its own trace).

    Each forward and each backward pass waits for its slower part, copies up or computing; all
    backward passes together for the gradients that come down. The drive may go on meanwhile.
    """
    early_s = 0.0 if device.one_processor else _compute_s(host, (Phase.EARLY,))
    update_s = _compute_s(host, (Phase.UPDATE,))
    forward, backward = {"compute": 0.0, "link": 0.0}, {"compute": 0.0, "link": 0.0}
    up_s = compute_s = 0.0
    for phase, _, link_s, work_s in passes_of(device):
        up_s, compute_s = up_s + link_s, compute_s + work_s
        group = backward if phase.in_backward else forward
        group["link" if link_s > work_s else "compute"] += max(link_s, work_s)
    if device.down_s > sum(backward.values()):
        backward = {"link": device.down_s}
    if early_s > sum(backward.values()):
        backward = {"update": early_s}
    passes = {name: forward.get(name, 0.0) + backward.get(name, 0.0)
              for name in ("compute", "link", "update")}  # fmt: skip
    cores = {"compute": compute_s, "update": early_s + update_s}
    if device.one_processor:
        cores = {"compute": compute_s + update_s}
    wires = cores | {"up": up_s, "down": device.down_s}
    beside_s = compute_s if device.one_processor else early_s
    return _limit(drive.beside(beside_s, update_s), passes, {"update": update_s}, wires)


def _limit(
    drive: Drive, passes: Mapping[str, float], update: Mapping[str, float],
    wires: Mapping[str, float],
) -> Limit:  # fmt: skip
    """``passes``, ``update``: whose the seconds of each are, but for the drive's.

    Of the drive's seconds as many cross the barrier as may, and as is best.
    """
    groups, disk_s = (passes, update), (drive.passes_s, drive.update_s)
    floor_s = [sum(group.values()) for group in groups]
    low, high = -min(drive.spare_s, disk_s[0]), min(drive.spare_s, disk_s[1])
    turns = (floor_s[0] - disk_s[0], disk_s[1] - floor_s[1], 0.0)
    shifts = [min(max(s, low), high) for s in turns]  # the sum is convex and bends there
    tries = [(disk_s[0] + s, disk_s[1] - s) for s in shifts]
    best = min(tries, key=lambda t: sum(map(max, t, floor_s)))
    whose = {"compute": 0.0}
    for group, drive_s, other_s in zip(groups, best, floor_s, strict=True):
        for name, seconds in {"disk": drive_s}.items() if drive_s > other_s else group.items():
            whose[name] = whose.get(name, 0.0) + seconds
    binding = max(whose, key=lambda name: whose[name])
    return Limit(sum(map(max, best, floor_s)), max(drive.whole_s, *wires.values()), binding)


def passes_of(device: Framed) -> Iterator[Pass]:
    """Each pass of a step on a device."""
    trace = device.trace
    ways = groupby(trace.moments, key=lambda m: m.phase.in_backward and not device.kept)
    found = [list(moments) for _, moments in ways]
    touched = [{need.chunk for m in moments for need in m.needs} for moments in found]
    least = sum(trace.chunk_bytes[c] for chunks in touched for c in chunks)
    again = max(device.read_bytes / least, 1.0) if least else 1.0  # fetched more than once
    for moments, chunks in zip(found, touched, strict=True):
        up_bytes = again * sum(device.up_bytes[c] for c in chunks)
        link_s = up_bytes / device.up_bytes_per_s if device.up_bytes_per_s else 0.0
        yield Pass(moments[-1].phase, up_bytes, link_s, _sum_s(moments))


def _compute_s(trace: Trace, phases: Sequence[Phase]) -> float:
    return _sum_s([m for m in trace.moments if m.phase in phases])


def _sum_s(moments: Sequence[Moment]) -> float:
    return sum(m.compute_s for m in moments)
