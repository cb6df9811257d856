"""When steps begin and end, and whether they are recorded or replayed. Plans are kept per kind."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from offload.engine import Engine
from offload.prefetch.plan import Plan
from offload.prefetch.trace import Trace
from offload.record import Follower, Recorder
from offload.watch import Watch

STRAY_SHARE = 0.1  # beyond this share of unforeseen moments the step is planned anew


class Kind(StrEnum):
    """What a step is: plans of one kind do not disturb those of another."""

    TRAIN = "train"
    INFER = "infer"


class Mode(StrEnum):
    """How a step is run."""

    RECORD = "record"  # on demand, watched closely
    REPLAY = "replay"  # following the plan
    FITS = "fits"  # everything stays in memory: nothing to do but the update


Planner = Callable[[Trace], Plan]


@dataclass(slots=True)
class Track:
    """What is known of one kind of step."""

    trace: Trace | None = None
    follower: Follower | None = None
    stale: bool = False  # the trace was refined: plan again
    steps: int = 0
    replayed_s: list[float] = field(default_factory=list)
    replayed_bytes: dict[str, list[int]] = field(default_factory=lambda: {"read": [], "write": []})
    fits: bool = False
    beside: Trace | None = None  # a replayed step, to be compared with the next

    @property
    def mode(self) -> Mode:
        if self.trace is None:
            return Mode.RECORD
        return Mode.FITS if self.fits else Mode.REPLAY


@dataclass(slots=True)
class _Suspended:
    kind: Kind
    recorder: Recorder | None
    follower: Follower | None


class Steps:
    """Opens and closes steps on the engine. ``plan_for`` may be None: always on demand."""

    def __init__(self, engine: Engine, plan_for: Planner | None, *, may_fit: bool = True) -> None:
        self.watch = Watch(lambda: engine.ledger.used_bytes + engine.ledger.held_bytes)
        self._may_fit = may_fit
        self.tracks = {kind: Track() for kind in Kind}
        self.current: Kind | None = None
        self._engine = engine
        self._plan_for = plan_for
        self._suspended: _Suspended | None = None
        self._moved: dict[str, int] = {}

    def begin(self, kind: Kind) -> Mode:
        """A forward pass of this kind starts; how its step is run.

        A training step that is under way goes on: this is one more micro-batch. An evaluation
        within it is a step of its own, after which training continues where it was.
        """
        if self.current is kind:
            return self.tracks[kind].mode
        if self.current is not None:
            self._suspended = _Suspended(self.current, self._engine.recorder, self._engine.follower)
            self._engine.settle()
        self.current = kind
        track = self.tracks[kind]
        self._make_plan(kind)
        self._moved = {n: lane.meter.moved_bytes for n, lane in self._engine.space.lanes.items()}
        if track.mode is Mode.RECORD:
            self.watch.start()
        self._engine.begin(self._recorder(), track.follower)
        return track.mode

    def end(self) -> None:
        """The running step is over."""
        if self.current is None:
            return
        engine, track = self._engine, self.tracks[self.current]
        engine.finish()
        self.watch.stop()
        assert engine.recorder is not None
        recorder = engine.recorder
        trace = recorder.finish(tuple(c.size_bytes for c in engine.space.chunks))
        track.steps += 1
        if track.mode is not Mode.RECORD:
            track.replayed_s.append(time.perf_counter() - recorder.began_s)
            for name, lane in engine.space.lanes.items():
                moved = lane.meter.moved_bytes - self._moved[name]
                track.replayed_bytes[name].append(moved)
        if track.mode is not Mode.FITS:  # without hooks it shows the update alone
            self._learn(track, trace)
        self._resume()

    def median_s(self, kind: Kind) -> float | None:
        """Median seconds of replayed steps."""
        seconds = self.tracks[kind].replayed_s
        return statistics.median(seconds) if seconds else None

    def fits(self, kind: Kind) -> bool:
        """Whether, by what was recorded, everything can stay in memory."""
        trace = self.tracks[kind].trace
        return trace is not None and self._may_fit and self._everything_fits(trace)

    def forget(self, kind: Kind) -> None:
        """Record the next step of this kind anew: it will touch other things."""
        self.tracks[kind] = Track(steps=self.tracks[kind].steps)

    def _recorder(self) -> Recorder:
        stall_s = self._engine.counters.stall_s
        return Recorder(lambda: sum(stall_s.values()))

    def _resume(self) -> None:
        before, self._suspended = self._suspended, None
        self.current = before.kind if before else None
        self._engine.recorder = before.recorder if before else None
        self._engine.follower = before.follower if before else None

    def _learn(self, track: Track, trace: Trace) -> None:
        old = track.trace
        if old is None or track.follower is None:
            track.trace, track.stale = trace, True
        elif [m.key for m in trace.moments] != [m.key for m in old.moments]:
            strays = track.follower.strays + abs(len(trace.moments) - len(old.moments))
            if strays > STRAY_SHARE * len(old.moments):
                track.trace, track.stale = trace, True
        elif len(track.replayed_s) == 1:
            # The first step also pays for lazy initialisation; the second tells the truth.
            track.trace, track.stale = _merged(old, trace), True
        elif len(track.replayed_s) == 2:
            track.beside = trace
        elif len(track.replayed_s) == 3 and track.beside is not None:
            # Compute and transfers share cores and DRAM: what a moment takes beside the planned
            # transfers is what counts from now on (the joint rate of promise P4).
            track.trace, track.stale = _retimed(old, track.beside, trace), True
            track.beside = None

    def _make_plan(self, kind: Kind) -> None:
        track = self.tracks[kind]
        if track.trace is None or not track.stale:
            return
        # A second step with hooks: the first also pays for lazy initialisation.
        track.fits = self.fits(kind) and bool(track.replayed_s or self._plan_for is None)
        if self._plan_for is None or not track.trace.moments:
            return  # a step may use none of our weights: the user's are in their place
        last = len(track.trace.moments) - 1
        touched = {n.chunk for m in track.trace.moments for n in m.needs}
        dead = {c: last for c in touched if self._engine.is_dead(c)}
        track.trace = replace(track.trace, dead_after=dead)
        track.follower = Follower(track.trace, self._plan_for(track.trace))
        track.stale = False

    def _everything_fits(self, trace: Trace) -> bool:
        """Whether no chunk has to leave memory, whatever the step does."""
        other_bytes = max((m.other_bytes for m in trace.moments), default=0)
        chunks = self._engine.space.chunks
        all_bytes = sum(c.size_bytes for c in chunks if c.offset >= 0)
        return all_bytes + other_bytes <= self._engine.ledger.capacity_bytes


def _merged(a: Trace, b: Trace) -> Trace:
    """Two steps of the same moments as one: the lesser times, the greater memory."""
    moments = tuple(
        replace(n, compute_s=min(m.compute_s, n.compute_s),
                other_bytes=max(m.other_bytes, n.other_bytes))
        for m, n in zip(a.moments, b.moments, strict=True)
    )  # fmt: skip
    return replace(b, moments=moments)


def _retimed(old: Trace, a: Trace, b: Trace) -> Trace:
    """A trace with the mean times of two others, and the memory of whichever saw most."""
    moments = tuple(
        replace(
            m, compute_s=(x.compute_s + y.compute_s) / 2,
            handling_s=(x.handling_s + y.handling_s) / 2,
            other_bytes=max(m.other_bytes, x.other_bytes, y.other_bytes),
        )
        for m, x, y in zip(old.moments, a.moments, b.moments, strict=True)
    )  # fmt: skip
    return replace(old, moments=moments)
