"""Whether reading ahead pays: where steps are slower than foreseen, some are run without it.

By turns with others that read ahead: a machine that is slow for seconds makes steps slower than
foreseen too, and is quick again when others are tried.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field, replace

from offload.prefetch.plan import Ops, Plan

SLOW = 1.25  # times the forecast, before anything is tried
STEPS = 4  # that are looked at before a trial
TRIES = 3  # steps without, each followed by one with
GAIN = 0.97  # what these must be of the others, to be believed


@dataclass(slots=True)
class Trial:
    """Of one plan. ``ahead``: whether the next step is to read ahead."""

    ahead: bool = True
    over: bool = False
    _seen_s: list[float] = field(default_factory=list)  # before it begins
    _without_s: float = 0.0  # the last one tried
    _shares: list[float] = field(default_factory=list)  # of the time with, that it took without

    def note(self, step_s: float, forecast_s: float) -> None:
        """The step took this long, and was foreseen to take that long with reading ahead."""
        if self.over:
            return
        if not self.ahead:
            self._without_s, self.ahead = step_s, True
        elif self._without_s:
            self._shares.append(self._without_s / step_s)
            self.over = len(self._shares) == TRIES
            self.ahead = self.over and statistics.median(self._shares) > GAIN
        else:
            self._seen_s = [*self._seen_s[1 - STEPS :], step_s]
            slow = statistics.median(self._seen_s) > SLOW * forecast_s
            self.ahead = len(self._seen_s) < STEPS or not slow


def without_reading_ahead(plan: Plan) -> Plan:
    """The same residency, but each chunk is read when it is needed."""
    loaded = {c for ops in plan.ops for c in ops.loads}
    return replace(
        plan,
        ops=tuple(Ops(ops.drops) for ops in plan.ops),
        resident_at_start=plan.resident_at_start - loaded,
    )
