"""Recording a step as a Trace, and following an earlier trace while a step runs."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from offload.prefetch.plan import Ops, Plan
from offload.prefetch.trace import Moment, Need, Phase, Trace

LOOK_AHEAD_MOMENTS = 64


@dataclass(slots=True)
class Recorder:
    """Notes each moment of the running step; ``finish`` makes the immutable trace.

    ``waited_s``: tells how long the engine has waited for transfers so far; that is no work.
    ``settle``: is called before the clock is read, for work that goes on when its call returns.
    """

    waited_s: Callable[[], float]
    settle: Callable[[], None] = lambda: None
    moments: list[Moment] = field(default_factory=list)
    began_s: float = field(default_factory=time.perf_counter)
    _lap_s: float = 0.0  # the clock without the waiting
    _other_bytes: int = 0

    def __post_init__(self) -> None:
        self._lap()

    def enter(self) -> None:
        """A new moment begins: the compute lane's work since the last one is over."""
        self._close()

    def leave(self, phase: Phase, needs: tuple[Need, ...], other_bytes: int) -> None:
        """The moment's needs are met; work goes on."""
        self._other_bytes = other_bytes
        self.moments.append(Moment(phase, needs, 0.0, other_bytes, self._lap()))

    def see_other(self, other_bytes: int) -> None:
        """Memory that is not chunks has grown within the moment."""
        self._other_bytes = max(self._other_bytes, other_bytes)

    def finish(self, chunk_bytes: tuple[int, ...]) -> Trace:
        """The trace of the step that ends now."""
        self._close()
        return Trace(tuple(self.moments), chunk_bytes, {})

    def _close(self) -> None:
        work_s = self._lap()
        if self.moments:
            last = self.moments[-1]
            self.moments[-1] = replace(last, compute_s=work_s, other_bytes=self._other_bytes)

    def _lap(self) -> float:
        """Seconds of work since the last lap."""
        self.settle()
        now_s = time.perf_counter() - self.waited_s()
        work_s, self._lap_s = now_s - self._lap_s, now_s
        return max(work_s, 0.0)


class Follower:
    """The cursor over a planned trace. It tolerates moments that are skipped, new or reordered."""

    def __init__(self, trace: Trace, plan: Plan) -> None:
        self.trace = trace
        self.plan = plan
        self.cursor = -1
        self.strays = 0
        self._places: defaultdict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        self._uses: defaultdict[int, list[int]] = defaultdict(list)
        for i, moment in enumerate(trace.moments):
            self._places[moment.key].append(i)
            for need in moment.needs:
                self._uses[need.chunk].append(i)

    @property
    def before_user_code(self) -> bool:
        """Whether the user's own code runs next: after the last moment of a backward pass."""
        moments, at = self.trace.moments, self.cursor
        if at < 0 or not moments[at].phase.in_backward:
            return False
        return at + 1 == len(moments) or not moments[at + 1].phase.in_backward

    def restart(self) -> None:
        """Go back to the start of the step."""
        self.cursor, self.strays = -1, 0

    def advance(self, phase: Phase, needs: tuple[Need, ...]) -> list[Ops]:
        """Move to this moment; the operations of it and of moments that were skipped.

        An unknown moment moves nothing and counts as a stray: it is served on demand.
        """
        places = self._places.get((phase, tuple(n.chunk for n in needs)), [])
        at = bisect_right(places, self.cursor)
        if at == len(places) or places[at] > self.cursor + LOOK_AHEAD_MOMENTS:
            self.strays += 1
            return []
        begin, self.cursor = self.cursor + 1, places[at]
        return list(self.plan.ops[begin : self.cursor + 1])

    def rest(self) -> list[Ops]:
        """The operations of moments that never came."""
        begin, self.cursor = self.cursor + 1, len(self.plan.ops) - 1
        return list(self.plan.ops[begin:])

    def comes_again(self, chunk: int) -> bool:
        """Whether the rest of this step uses a chunk."""
        uses = self._uses.get(chunk)
        return uses is not None and uses[-1] > self.cursor

    def next_use(self, chunk: int) -> int:
        """How many moments until this chunk is used next, round the cycle; huge when never."""
        uses = self._uses.get(chunk)
        if not uses:
            return 1 << 60
        at = bisect_right(uses, self.cursor)
        if at < len(uses):
            return uses[at] - self.cursor
        return uses[0] + len(self.trace.moments) - self.cursor
