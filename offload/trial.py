"""Whether reading ahead pays: where steps are slower than foreseen, some are run without it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace

from offload.prefetch.plan import Ops, Plan

SLOW = 1.25  # times the forecast, before anything is tried
STEPS = 4  # that are looked at before a trial
TRIES = 2  # steps without
GAIN = 0.97  # what these must be of the others, to be believed


@dataclass(slots=True)
class Trial:
    """Of one plan. ``ahead``: whether the next step is to read ahead."""

    ahead: bool = True
    over: bool = False
    _with_s: list[float] = field(default_factory=list)
    _without_s: list[float] = field(default_factory=list)

    def note(self, step_s: float, forecast_s: float) -> None:
        """The step took this long, and was foreseen to take that long with reading ahead."""
        if self.over:
            return
        if self.ahead:
            self._with_s = [*self._with_s[1 - STEPS :], step_s]
            slow = statistics.median(self._with_s) > SLOW * forecast_s
            self.ahead = len(self._with_s) < STEPS or not slow
            return
        self._without_s.append(step_s)
        if len(self._without_s) == TRIES:
            self.over = True
            with_s, without_s = map(statistics.median, (self._with_s, self._without_s))
            self.ahead = without_s > GAIN * with_s


def without_reading_ahead(plan: Plan) -> Plan:
    """The same residency, but each chunk is read when it is needed."""
    loaded = {c for ops in plan.ops for c in ops.loads}
    return replace(
        plan,
        ops=tuple(Ops(ops.drops) for ops in plan.ops),
        resident_at_start=plan.resident_at_start - loaded,
    )
