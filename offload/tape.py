"""What one step did, event by event, as it happens. Nothing is worked out here: see timeline.py.

Observing only: an event is one append of a tuple, most of them from a line that asks first whether
anybody records. A tape holds about 200 bytes an event; there are as many as transfers, moments and
saved tensors, so tens of MB for a model of 100 B parameters, and tens of KB for a small one. It is
not debited: kernels' temporaries are not either, and are larger.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from offload.counters import Stall
from offload.ledger import Ledger, Other
from offload.prefetch.trace import Need, Phase
from offload.record import Follower
from offload.tiers.lane import Meter, Span

if TYPE_CHECKING:
    from offload.engine import Engine


class Mark(Enum):
    """Something that says whom the processor works for."""

    MODULE = "module"  # its forward begins; the name is the module's
    RERUN = "rerun"  # the same, within the backward pass
    GRADIENT = "gradient"  # it has arrived; the name is the parameter's
    FORWARD_ENDS = "forward ends"
    UPDATED = "updated"  # a group of chunks


@dataclass(frozen=True, slots=True)
class Sample:
    """A tier's memory at one moment, and what changed: bytes more of a chunk's frame or of a kind.

    ``what``: the chunk; a kind of other memory; -1, an idle frame. ``used_bytes`` is the ledger's,
    of which ``idle_bytes`` are frames that hold nothing.
    """

    at_s: float
    what: int | Other
    change_bytes: int
    used_bytes: int
    idle_bytes: int


@dataclass(frozen=True, slots=True)
class Holding:
    """A tier's memory when the step begins: ``chunks`` has one entry for each frame in use.

    ``kv_disk_bytes``: of keys and values that are on disk, which may be gone with their rows when
    somebody asks.
    """

    at_s: float
    chunks: tuple[int, ...]
    other_bytes: dict[Other, int]
    fixed_bytes: int
    used_bytes: int
    idle_bytes: int
    kv_disk_bytes: int


@dataclass(frozen=True, slots=True)
class _Source:
    """What is observed, and what its lanes had moved when that began."""

    engine: Engine
    ledger: Ledger
    meters: dict[str, Meter]


class Tape:
    """Events of one step of one engine. Seconds are of ``time.perf_counter``.

    ``meters``: of the engine's lanes, when the step began. ``follower``: the plan that it follows.
    """

    def __init__(
        self, engine: Engine, began_s: float, meters: dict[str, Meter], follower: Follower | None
    ) -> None:
        ledger = engine.ledger
        self.follower = follower
        self.ended_s = self._entered_s = began_s
        self.moments: list[tuple[float, float, Phase, tuple[Need, ...]]] = []  # from, to
        self.stalls: list[Stall] = []
        self.marks: list[tuple[float, Mark, str]] = []
        self.lanes: dict[str, list[Span]] = {}  # of transfers that ended in the step
        self.before = Holding(
            began_s, tuple(engine.space.held()), dict(ledger.other_by_kind), ledger.fixed_bytes,
            ledger.used_bytes, ledger.idle_bytes, engine.tenants.kv_disk_bytes(),
        )  # fmt: skip
        self._samples: list[tuple[float, int | Other, int, int, int]] = []
        self._source = _Source(engine, ledger, meters)
        engine.tape = self
        engine.counters.seen = self.stalls.append
        ledger.seen = engine.space.pool.seen = self._see

    @property
    def began_s(self) -> float:
        """When the step began."""
        return self.before.at_s

    # -- while the step runs ----------------------------------------------------------------

    def enter(self) -> None:
        """A moment begins: the engine is asked for chunks."""
        self._entered_s = time.perf_counter()

    def leave(self, phase: Phase, needs: tuple[Need, ...]) -> None:
        """They are there: work goes on."""
        self.moments.append((self._entered_s, time.perf_counter(), phase, needs))

    def mark(self, mark: Mark, name: str = "") -> None:
        """Note whom the processor works for."""
        self.marks.append((time.perf_counter(), mark, name))

    def copied(
        self, lane: str, start_s: float, size_bytes: int, end_s: float | None = None
    ) -> None:
        """Bytes were moved until ``end_s`` (now), in none of the engine's lanes."""
        end_s = time.perf_counter() if end_s is None else end_s
        self.lanes.setdefault(lane, []).append((-1, start_s, end_s, size_bytes))

    def _see(self, what: int | Other, change_bytes: int) -> None:
        ledger = self._source.ledger
        self._samples.append(
            (time.perf_counter(), what, change_bytes, ledger.used_bytes, ledger.idle_bytes)
        )

    # -- afterwards -------------------------------------------------------------------------

    def end(self, meters: dict[str, Meter]) -> None:
        """The step is over, with these meters: nothing more is noted."""
        self.ended_s = time.perf_counter()
        for name, lane in self._source.engine.space.lanes.items():
            first = self._source.meters[name].transfers
            self.lanes[name] = lane.between(first, meters[name].transfers)
        self.give_up()

    def give_up(self) -> None:
        """The step was interrupted: what follows is not its own."""
        engine = self._source.engine
        if engine.tape is self:
            engine.tape = engine.counters.seen = None
            engine.ledger.seen = engine.space.pool.seen = None

    def samples(self) -> Iterable[Sample]:
        """Every change of what the tier holds, in order."""
        return (Sample(*values) for values in self._samples)


def meters_of(engine: Engine) -> dict[str, Meter]:
    """What each lane of an engine has moved so far."""
    return {name: lane.meter.copy() for name, lane in engine.space.lanes.items()}
