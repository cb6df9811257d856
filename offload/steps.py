"""When steps begin and end, and whether they are recorded or replayed. Plans are kept per kind.

[Note: forms of inference]
Prefill, decode, an encoder by itself and batches of other sizes are steps of one kind, and each
has its own track, by the call's form; the least recently used are forgotten. A new form starts by
following the plan of the one before it, under watch: mostly the moments are the same, and only
times and memory differ. A form is watched again when its input, with the cache, has grown.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial

from offload.calls import Call
from offload.engine import Engine
from offload.prefetch.plan import Plan
from offload.prefetch.trace import Moment, Trace
from offload.record import Follower, Recorder
from offload.spins import ShortSpins
from offload.tape import Tape, meters_of
from offload.tiers.lane import Meter
from offload.track import RETIMED_AFTER, Mode, Track
from offload.trial import Trial
from offload.watch import Watch

FORMS = 8  # of inference, that plans are kept for
GROWTH = 1.25  # of an inference's extent, for which a watched step leaves room
# The same of a cache, to whose length what a step takes is at most proportional: as far as a small
# part of memory allows, since watching and planning anew take twice a step.
CACHE_GROWTH, CACHE_SHARE = 4.0, 1 / 64


class Kind(StrEnum):
    """What a step is: plans of one kind do not disturb those of another."""

    TRAIN = "train"
    INFER = "infer"


Planner = Callable[[Trace], Plan]
ANY_CALL = Call()


@dataclass(slots=True)
class _Step:
    """The step under way: how it runs."""

    kind: Kind
    mode: Mode
    call: Call
    ahead: bool = True  # whether it reads ahead
    tape: Tape | None = None  # what it does
    meters: dict[str, Meter] = field(default_factory=dict)  # of the lanes, when it began


@dataclass(slots=True)
class _Suspended:
    step: _Step
    recorder: Recorder | None
    follower: Follower | None


class Steps:
    """Opens and closes steps on the engine. ``plan_for`` may be None: always on demand.

    ``tracks``: for inference, that of the form which was called last.
    """

    def __init__(
        self, engine: Engine, plan_for: Planner | None, *, may_fit: bool = True, tapes: bool = True,
        spins: ShortSpins | None = None,
    ) -> None:  # fmt: skip
        self.watch = Watch(lambda: engine.ledger.used_bytes + engine.ledger.held_bytes)
        self.tracks = {kind: Track() for kind in Kind}
        self.forms: OrderedDict[str, Track] = OrderedDict()  # of inference, latest call last
        self.constant_bytes = 0  # of memory that is not chunks: the same however inputs grow
        # By a recorded step: whether nothing will have to move from now on.
        self.all_fits: Callable[[Trace], bool] = self._everything_fits if may_fit else _never
        self.tapes = tapes  # whether planned steps are noted for the report
        self._engine = engine
        self._plan_for = plan_for
        self._spins = spins  # told of each step whether its plan moves anything
        self._step: _Step | None = None
        self._suspended: _Suspended | None = None

    @property
    def current(self) -> Kind | None:
        """The kind of the step under way."""
        return self._step.kind if self._step is not None else None

    @property
    def all_in_memory(self) -> bool:
        """Whether nothing has to move in the step under way."""
        return self._step is not None and self._step.mode is Mode.FITS

    def begin(self, kind: Kind, call: Call = ANY_CALL) -> Mode:
        """A forward pass of this kind starts; how its step is run.

        A training step that is under way goes on: this is one more micro-batch. An evaluation
        within it is a step of its own, after which training continues where it was.
        """
        if self.current is Kind.INFER:  # it was cut short: half a step is no example
            self.watch.stop()
            self._resume()
        if self._step is not None and kind is Kind.TRAIN:
            return self._mode(kind, call)
        if self._step is not None:
            engine = self._engine
            self._stop_tape(self._step)
            self._suspended = _Suspended(self._step, engine.recorder, engine.follower)
            engine.settle()
        if kind is Kind.INFER:
            self.tracks[kind] = self._form(call)
        track = self.tracks[kind]
        self._make_plan(kind)
        mode = self._mode(kind, call)
        self._step = _Step(kind, mode, call, mode is not Mode.REPLAY or track.trial.ahead)
        meters = self._step.meters = meters_of(self._engine)
        if mode is Mode.RECORD:
            self._engine.ledger.heap.keep(0)  # to see what the step cannot do without
            self.watch.start()
        # Where all fits inference moves nothing; a training step's update still follows its plan.
        still = mode is Mode.FITS and kind is Kind.INFER
        follower = None if still else track.following(ahead=self._step.ahead)
        recorder = self._recorder(kind, learns=len(track.replayed_s) < RETIMED_AFTER[-1])
        if self.tapes and mode is not Mode.RECORD:
            self._step.tape = Tape(self._engine, recorder.began_s, meters, track.follower)
        if self._spins is not None:
            self._spins.want(follower is not None and follower.plan.forecast.moved_bytes > 0)
        self._engine.begin(recorder, follower)
        return mode

    def end(self) -> None:
        """The running step is over."""
        if self._step is None:
            return
        engine, step, track = self._engine, self._step, self.tracks[self._step.kind]
        engine.finish()
        meters = meters_of(engine)
        if step.tape is not None:
            step.tape.end(meters)
            track.tape = step.tape
        self.watch.stop()
        engine.ledger.heap.keep(self.watch.excess_bytes)
        assert engine.recorder is not None
        recorder = engine.recorder
        trace = recorder.finish(tuple(c.size_bytes for c in engine.space.chunks))
        track.steps += 1
        if step.mode is not Mode.RECORD:
            self._time(track, step, time.perf_counter() - recorder.began_s, meters)
        elif step.kind is Kind.INFER:
            capacity_bytes = engine.ledger.capacity_bytes
            growth = GROWTH
            if step.call.goes_on:
                growth = _cache_growth(trace, capacity_bytes, self.constant_bytes)
            track.extent = max(track.extent, int(step.call.extent * growth))
            trace = _roomier(trace, capacity_bytes, self.constant_bytes, growth)
        if step.mode is not Mode.FITS and step.ahead:  # without hooks it shows the update alone
            track.learn(trace, watched=step.mode is Mode.RECORD)
        self._resume()

    def _time(self, track: Track, step: _Step, step_s: float, meters: dict[str, Meter]) -> None:
        """Note how long a replayed step took, and what it moved."""
        if step.kind is Kind.INFER and step.mode is Mode.REPLAY and track.follower is not None:
            track.trial.note(step_s, track.follower.plan.forecast.step_s)
        if step.ahead is not track.trial.ahead:
            return  # it was a try that is not taken up
        track.replayed_s.append(step_s)
        if step.mode is Mode.FITS and step.kind is Kind.TRAIN:
            track.learn_bare(step_s)
        for name, then in step.meters.items():
            track.replayed_bytes[name].append(meters[name].moved_bytes - then.moved_bytes)
            track.busy_s[name].append(meters[name].busy_s - then.busy_s)

    def _form(self, call: Call) -> Track:
        """The track of a call's form; a new one begins with what is known of the one before."""
        track = self.forms.pop(call.form, None)
        if track is None:
            near = next((t for t in reversed(self.forms.values()) if t.part == call.part), Track())
            track = near.like(call)
        self.forms[call.form] = track
        while len(self.forms) > FORMS:
            self.forms.popitem(last=False)
        return track

    def _mode(self, kind: Kind, call: Call) -> Mode:
        """How a pass is run: watched where its input is larger than what was watched so far."""
        track = self.tracks[kind]
        grown = call.extent > track.extent
        if grown:
            track.extent = call.extent
        if grown and (kind is Kind.INFER or track.mode is Mode.FITS):
            return Mode.RECORD
        return track.mode

    def median_s(self, kind: Kind) -> float | None:
        """Median seconds of replayed steps."""
        return self.tracks[kind].step_s

    def fits(self, kind: Kind) -> bool:
        """Whether, by what was recorded, everything can stay in memory."""
        trace = self.tracks[kind].trace
        return trace is not None and self.all_fits(trace)

    def forget(self, kind: Kind) -> None:
        """Record the next step of this kind anew: it will touch other things."""
        if kind is Kind.INFER:
            self.forms.clear()
        before = self.tracks[kind]
        self.tracks[kind] = Track(steps=before.steps, tape=before.tape)

    def _recorder(self, kind: Kind, *, learns: bool) -> Recorder:
        # What inference fetches from below it fetches for a copy, and a trial is to know of it.
        waited_s = partial(self._engine.counters.stalled_s, below=kind is Kind.TRAIN)
        return Recorder(waited_s, self._engine.await_compute) if learns else Recorder(waited_s)

    @staticmethod
    def _stop_tape(step: _Step) -> None:
        """It has ended already, or the step is interrupted, and is no example."""
        if step.tape is not None:
            step.tape.give_up()
            step.tape = None

    def _resume(self) -> None:
        if self._step is not None:
            self._stop_tape(self._step)
        before, self._suspended = self._suspended, None
        self._step = before.step if before else None
        self._engine.recorder = before.recorder if before else None
        self._engine.follower = before.follower if before else None

    def _make_plan(self, kind: Kind) -> None:
        track = self.tracks[kind]
        if track.trace is None or not track.stale:
            return
        # Steps with hooks until times are known: the first ones also pay for lazy initialisation.
        least = RETIMED_AFTER[0] if kind is Kind.TRAIN else 1
        timed = len(track.replayed_s) >= least or self._plan_for is None
        track.fits = self.fits(kind) and timed
        if self._plan_for is None or not track.trace.moments:
            return  # a step may use none of our weights: the user's are in their place
        last = len(track.trace.moments) - 1
        touched = {n.chunk for m in track.trace.moments for n in m.needs}
        dead = {c: last for c in touched if self._engine.moves.is_dead(c)}
        track.trace = replace(track.trace, dead_after=dead)
        track.follower = Follower(track.trace, self._plan_for(track.trace))
        track.trial, track.stale = Trial(), False

    def _everything_fits(self, trace: Trace) -> bool:
        """Whether no chunk has to leave memory, whatever the step does."""
        other_bytes = max((m.other_bytes for m in trace.moments), default=0)
        chunks = self._engine.space.chunks
        all_bytes = sum(c.size_bytes for c in chunks if c.offset >= 0)
        return all_bytes + other_bytes <= self._engine.ledger.capacity_bytes


def _never(trace: Trace) -> bool:
    return False


def _cache_growth(trace: Trace, capacity_bytes: int, constant_bytes: int) -> float:
    """How far a cache may grow before a step with it is watched again."""
    most_bytes = max((m.other_bytes for m in trace.moments), default=0) - constant_bytes
    room_bytes = CACHE_SHARE * capacity_bytes
    return min(max(1 + room_bytes / max(most_bytes, 1), GROWTH), CACHE_GROWTH)


def _roomier(trace: Trace, capacity_bytes: int, constant_bytes: int, growth: float) -> Trace:
    """With room, where there is some, for inputs that grow before they are watched again."""

    def room(moment: Moment) -> int:
        held_bytes = sum(trace.chunk_bytes[c] for c in {n.chunk for n in moment.needs})
        most_bytes = max(capacity_bytes - held_bytes, moment.other_bytes)
        growing_bytes = max(moment.other_bytes - constant_bytes, 0)
        return min(moment.other_bytes + int(growing_bytes * (growth - 1)), most_bytes)

    return replace(trace, moments=tuple(replace(m, other_bytes=room(m)) for m in trace.moments))
