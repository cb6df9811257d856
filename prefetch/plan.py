"""A plan: what the engine does at each moment, and what that is predicted to cost. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from offload.prefetch.bounds import IDLE, Drive, Limit
from offload.prefetch.trace import Phase


@dataclass(frozen=True, slots=True)
class Ops:
    """What to start on entering a moment, before waiting for what it needs.

    ``drops``: chunks that leave the fast tier (written first where dirty); their room is free
    when that write is done. ``loads``: chunks whose read is queued now, in this order; a read
    starts as soon as there is room for it.
    """

    drops: tuple[int, ...] = ()
    loads: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What one steady-state step is predicted to take.

    ``bound_s``: sum over phases that cannot overlap of the slowest resource in each.
    ``wire_bound_s``: the same without barriers. ``stall_s``: compute waiting for I/O.
    """

    step_s: float
    bound_s: float
    wire_bound_s: float
    stall_s: float
    peak_bytes: int
    read_bytes: int
    write_bytes: int
    binding: str  # "disk" or "compute": which resource makes most of bound_s
    drive: Drive = IDLE  # what the bound is made of, beside computing
    phase_read_bytes: dict[Phase, int] = field(default_factory=dict)  # what the drive's seconds are
    phase_write_bytes: dict[Phase, int] = field(default_factory=dict)

    @property
    def moved_bytes(self) -> int:
        """In both directions."""
        return self.read_bytes + self.write_bytes

    @property
    def limit(self) -> Limit:
        """The bounds, and what binds."""
        return Limit(self.bound_s, self.wire_bound_s, self.binding)


@dataclass(frozen=True, slots=True)
class Plan:
    """Immutable operations per moment of one trace under one budget."""

    ops: tuple[Ops, ...]
    resident_at_start: frozenset[int]
    reserve_bytes: int  # room kept for reading ahead
    forecast: Forecast
