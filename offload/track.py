"""What is known of one kind of step, or of one form of inference: its moments and its times."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from offload.calls import Call
from offload.prefetch.plan import Forecast
from offload.prefetch.trace import Trace, merged, paced, retimed
from offload.record import Follower
from offload.tape import Tape
from offload.trial import Trial, without_reading_ahead

STRAY_SHARE = 0.1  # beyond this share of unforeseen moments the step is planned anew
RETIMED_AFTER = (3, 7)  # replayed steps: first times soon, then sure ones
BARE_STEPS = 3  # without hooks, that tell how long such steps take


class Mode(StrEnum):
    """How a step is run."""

    RECORD = "record"  # on demand, watched closely
    REPLAY = "replay"  # following the plan
    FITS = "fits"  # everything stays in memory: nothing to do but the update


@dataclass(slots=True)
class Track:
    """What is known of one kind of step."""

    trace: Trace | None = None
    follower: Follower | None = None
    stale: bool = False  # the trace was refined: plan again
    steps: int = 0
    replayed_s: list[float] = field(default_factory=list)
    replayed_bytes: dict[str, list[int]] = field(default_factory=lambda: {"read": [], "write": []})
    busy_s: dict[str, list[float]] = field(default_factory=lambda: {"read": [], "write": []})
    fits: bool = False
    beside: list[Trace] = field(default_factory=list)  # replayed steps that times come from
    bare_s: list[float] = field(default_factory=list)  # of the first steps without hooks
    extent: int = 0  # the largest call that was watched, see calls.Call
    trial: Trial = field(default_factory=Trial)
    part: str = ""  # of the model, which is called
    borrowed: bool = False  # trace and plan are another form's
    tape: Tape | None = None  # of the last step that followed a plan

    @property
    def mode(self) -> Mode:
        if self.trace is None:
            return Mode.RECORD
        return Mode.FITS if self.fits else Mode.REPLAY

    def following(self, *, ahead: bool) -> Follower | None:
        """Whom the engine follows; not ``ahead``: with the same residency, on demand."""
        if self.follower is None or ahead:
            return self.follower
        return Follower(self.follower.trace, without_reading_ahead(self.follower.plan))

    def begin_anew(self, trace: Trace) -> None:
        """Steps go this way from now on; what others took tells nothing of it."""
        self.trace, self.stale, self.borrowed = trace, True, False
        self.beside.clear()
        self.bare_s.clear()

    def learn(self, trace: Trace, *, watched: bool) -> None:
        """A step went so; ``watched``: it was recorded, and memory with it."""
        old = self.trace
        if old is None or self.follower is None or self.borrowed:
            self.begin_anew(trace)
        elif [m.key for m in trace.moments] != [m.key for m in old.moments]:
            strays = self.follower.strays + abs(len(trace.moments) - len(old.moments))
            if strays > STRAY_SHARE * len(old.moments):
                self.begin_anew(trace)
        elif watched:
            more = any(m.other_bytes > n.other_bytes
                       for m, n in zip(trace.moments, old.moments, strict=True))  # fmt: skip
            self.trace, self.stale = retimed(trace, old), more or self.stale
        elif len(self.replayed_s) == 1:
            # The first step also pays for lazy initialisation; the second tells the truth.
            self.trace, self.stale = merged(old, trace), True
        elif len(self.replayed_s) <= RETIMED_AFTER[-1]:
            # Compute and transfers share cores and DRAM: what a moment takes beside the planned
            # transfers is what counts from now on (the joint rate of promise P4).
            self.beside.append(trace)
            if len(self.replayed_s) in RETIMED_AFTER:
                self.trace, self.stale = retimed(old, *self.beside), True
        else:
            self.beside.clear()

    def learn_bare(self, step_s: float) -> None:
        """A step without hooks has no moments; the trace, recorded with them, takes its length."""
        if self.trace is None or self.follower is None or len(self.bare_s) >= BARE_STEPS:
            return
        self.bare_s.append(step_s)
        if len(self.bare_s) == BARE_STEPS:
            times = statistics.median(self.bare_s) / self.follower.plan.forecast.step_s
            self.trace, self.stale = paced(self.trace, times), True

    @property
    def forecast(self) -> Forecast | None:
        """Of the plan that steps follow; None: nothing is planned."""
        return self.follower.plan.forecast if self.follower is not None else None

    @property
    def step_s(self) -> float | None:
        """Median seconds of replayed steps."""
        return statistics.median(self.replayed_s) if self.replayed_s else None

    def bytes_per_s(self, lane: str) -> float:
        """A lane's rate in a replayed step, the median; 0: it moved nothing in any."""
        moved = zip(self.replayed_bytes[lane], self.busy_s[lane], strict=True)
        return statistics.median([b / s for b, s in moved if b and s] or [0.0])

    def stats(self) -> dict[str, Any]:
        """See docs/stats.md."""
        return {"steps": self.steps, "step_s": self.step_s, "reads_ahead": self.trial.ahead}

    def like(self, call: Call) -> Track:
        """A new track that begins with what is known of this one."""
        if self.trace is None:
            return Track(part=call.part)
        plan = self.follower.plan if self.follower is not None else None
        follower = Follower(self.trace, plan) if plan is not None and not self.stale else None
        fits = self.fits and call.extent <= self.extent
        return Track(
            self.trace, follower, stale=follower is None, fits=fits,
            extent=self.extent if fits else 0, part=call.part, borrowed=True,
        )  # fmt: skip
