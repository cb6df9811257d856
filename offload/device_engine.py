"""The engine of the device level, and the level as a whole."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.device import DeviceSpace
from offload.engine import Engine
from offload.errors import BudgetError
from offload.ledger import Ledger, Other
from offload.outgoing import Outgoing
from offload.prefetch.plan import Ops
from offload.prefetch.planner import smallest_bytes
from offload.prefetch.trace import Access, Need, Phase
from offload.residents import Residents
from offload.steps import Kind, Steps
from offload.tape import Tape
from offload.tiers.bus import Bus
from offload.tiers.home import Chunk, HomeSpace
from offload.tiers.spec import GIB, format_size
from offload.watch import AllocatorWatch


class DeviceEngine(Engine):
    """The engine of the device level: chunks in use by tensors are not for eviction.

    ``lasting``: whether copies outlive passes. Else what only the next step uses is not fetched.
    """

    def __init__(self, space: DeviceSpace, ledger: Ledger, *, lasting: bool = False) -> None:
        # DeviceSpace has all that Engine asks of a HomeSpace without a disk below.
        super().__init__(cast(HomeSpace, space), ledger)
        self.frames = space
        self._lasting = lasting
        self.counters.stall_s["download"] = 0.0  # for gradients that were sent
        self.counters.below = space.host_counters
        self.given_back: deque[int] = deque()  # bytes of activations; any thread may append
        self._owed: set[int] = set()  # wanted by the plan, given up at the end of a pass
        self._put_off: set[int] = set()  # planned drops of chunks that tensors still refer to
        self._largest_result = 0  # bytes of an operation's result in a watched forward pass
        self.give_up: Callable[[], bool] = lambda: False  # of what lives here: frees some of it

    def need(self, phase: Phase, needs: tuple[Need, ...]) -> None:
        self.frames.phase = phase
        self.collect()
        self._put_off.difference_update(n.chunk for n in needs)
        self._drop_late()
        if self._owed:
            self._queue_again()
        super().need(phase, needs)
        if phase.in_backward and self.follower is None and self.recorder is not None:
            held = sum(self.frames.chunks[n.chunk].size_bytes for n in needs)
            most = self.ledger.capacity_bytes - held
            passing = self.ledger.other_bytes + self.passing_bytes
            self.recorder.see_other(max(min(passing, most), self.ledger.other_bytes))

    def await_compute(self) -> None:
        self.frames.pool.memory.wait()

    def foresee(self, size_bytes: int, what: str) -> None:
        """A watched forward pass is about to make this. Raises BudgetError."""
        self._largest_result = max(self._largest_result, size_bytes)
        self.pass_through(size_bytes, what)

    @property
    def passing_bytes(self) -> int:
        """What a backward operation may hold beside what was saved: nobody can look into it.

        The gradient of the largest result and one more of its size, as a loss over a vocabulary
        does. Room is kept where it can be had.
        """
        return 2 * self._largest_result

    def _coming_bytes(self) -> int:
        coming = super()._coming_bytes()
        if self.follower is None and self._phase.in_backward:
            return max(coming, self.passing_bytes)
        return coming

    def serve(self, phase: Phase, param: nn.Parameter) -> Tensor:
        """A view of a parameter's present value, brought here if need be."""
        chunk = self.frames.slots[param].chunk
        if self.frames.outdated(param):
            self._discard(self.frames.chunks[chunk])
        self.need(phase, (Need(chunk, Access.READ),))
        if self.frames.scrutiny.careful and self.frames.differs(chunk):
            self._discard(self.frames.chunks[chunk])
            self.need(phase, (Need(chunk, Access.READ),))
        return self.frames.view(param)

    def retire(self) -> None:
        """No copy of a weight is kept. Those that the plan would have kept are fetched again."""
        self.collect()
        gone = [*self.moves.resident, *(c.id for c in self.frames.loads())]
        for c in gone:
            self._discard(self.frames.chunks[c])
        self._last = ()
        self._put_off.clear()
        if self.follower is not None:
            self._owed.update(gone)

    def begin(self, *args: Any) -> None:
        self._owed.clear()
        super().begin(*args)

    def finish(self) -> None:
        # What the plan would fetch for the next step is fetched when that begins: after the update.
        self.follower = None
        self._owed.clear()
        self._queue.clear()
        super().finish()

    def pass_through(self, size_bytes: int, what: str) -> None:
        """Make room for memory that is there for a moment only. Raises BudgetError."""
        self.make_room_for(size_bytes, what)
        if self.recorder is not None:
            self.recorder.see_other(self.ledger.other_bytes + size_bytes)

    def _issue(self, ops: Ops) -> None:
        # Autograd may hold views of what the plan would drop. That would give no room, and the
        # chunk would soon be there twice.
        viewed = {c for c in ops.drops if self._is_viewed(c)}
        self._put_off |= viewed
        drops = tuple(c for c in ops.drops if c not in viewed)
        super()._issue(Ops(drops, tuple(c for c in ops.loads if self._is_used(c))))

    def _is_used(self, chunk: int) -> bool:
        """Whether a copy would be used before it is given up."""
        return self._lasting or self.follower is None or self.follower.comes_again(chunk)

    def _abandon_a_load(self, keep: set[int]) -> bool:
        """Before the last resort is to refuse: weights that live here can go home."""
        return super()._abandon_a_load(keep) or self.give_up()

    def _drop_late(self) -> None:
        for c in [c for c in self._put_off if not self._is_viewed(c)]:
            self._put_off.discard(c)
            if c in self.moves.resident:
                self._discard(self.frames.chunks[c])

    def _is_viewed(self, chunk: int) -> bool:
        frame = self.frames.chunks[chunk].frame
        return frame is not None and self.frames.pool.viewed(frame)

    def _queue_again(self) -> None:
        assert self.follower is not None
        owed = {c for c in self._owed if self._is_used(c)}
        wanted = (owed | set(self._queue)) - self.moves.resident.keys()
        self._queue.clear()
        self._queue.extend(sorted(wanted, key=self.follower.next_use))
        self._owed.clear()

    def _discard(self, chunk: Chunk) -> None:
        if chunk.loading is not None:
            self.frames.abandon_load(chunk)
        else:
            self.moves.forget(chunk, dead=False)

    def collect(self) -> None:
        """Notice what was let go of, perhaps on another thread: views and activations."""
        self.frames.pool.collect()
        while self.given_back:
            self.ledger.give_other(self.given_back.popleft())

    def noticed(self, desperate: bool) -> bool:
        """A relief: what was let go of, on whatever thread, since the engine looked last."""
        room_bytes = self.ledger.room_bytes
        self.collect()
        return self.ledger.room_bytes > room_bytes

    def take_other(self, size_bytes: int, what: str, kind: Other = Other.ACTIVATIONS) -> None:
        self.collect()
        super().take_other(size_bytes, what, kind)

    def make_room_for(self, size_bytes: int, what: str) -> None:
        self.collect()
        super().make_room_for(size_bytes, what)

    def _victim(self, keep: set[int]) -> Chunk | None:
        """As on the host, of those that no tensor refers to: others would give no room."""
        viewed = {c for c in self.moves.resident if self._is_viewed(c)}
        return super()._victim(keep | viewed)

    def _refuse(self, size_bytes: int, keep: set[int], what: str) -> NoReturn:
        ledger = self.ledger
        free_bytes = ledger.room_bytes
        held = ledger.budget_bytes - free_bytes - ledger.fixed_bytes - ledger.other_bytes
        least = ledger.budget_bytes - free_bytes + size_bytes
        raise BudgetError(
            f"device tier: {what} needs {format_size(size_bytes)} more, but of the budget of "
            f"{format_size(ledger.budget_bytes)} weights in use take {format_size(held)}, "
            f"activations {format_size(ledger.other_bytes)}, buffers "
            f"{format_size(ledger.fixed_bytes)}; this step needs device_memory of at least "
            f"{format_size(least)}: give that, or {self.outlook.remedy}",
            tier="device",
            needed_bytes=least,
            given_bytes=ledger.budget_bytes,
            smallest_bytes=least,
        )


UNMEASURED_BYTES_PER_S = 8.0 * GIB  # a copy's rate, until a recorded step has measured it


@dataclass(slots=True, eq=False)
class Device:
    """The device level of a run.

    ``dtype``: of floating weights in frames; None: as in their homes. ``trust_versions``: copies
    outlive passes, since the user promises that writes to weights go through autograd's versions.
    """

    place: torch.device
    dtype: torch.dtype | None
    engine: DeviceEngine
    steps: Steps
    trust_versions: bool = False
    settles: bool = False  # weights may come to live there; see offload.residents
    outgoing: Outgoing | None = None  # gradients leave beside the backward pass
    residents: Residents | None = None  # weights that live on the device
    bus: Bus | None = None  # to memory of the device's own
    aside_bytes: int = 0  # beyond the budget, what watched steps were seen and said to take

    def lives_here(self, tensor: Tensor) -> bool:
        """Whether a saved tensor is a weight that lives on the device."""
        return self.residents is not None and self.residents.holds(tensor)

    def settle_residents(self, host: Steps) -> None:
        """A pass begins. Between steps, weights come for which the last step left room."""
        residents = self.residents
        if residents is None:
            return
        residents.begin_pass()
        if host.current is None:
            trace = self.steps.tracks[residents.kind].trace
            if trace is not None and not residents.chunks:
                self.engine.retire()  # frames that outlive passes hold the room
                residents.consider(trace, host.tracks[residents.kind].trace, self._up_bytes_per_s())
            if residents.take_moved():
                for steps, kind in product((host, self.steps), Kind):
                    steps.forget(kind)

    def may_update_at_once(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer may step by itself: all it trains, and its temporaries, fit here.

        Those of a foreach step are about twice its weights; a fused one has none.
        """
        if self.residents is None or not self.residents.complete:
            return False
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not all(self.residents.has(p) for p in params):
            return False
        fused = all(group.get("fused") for group in optimizer.param_groups)
        temporaries_bytes = 0 if fused else 2 * sum(p.nbytes for p in params)
        return temporaries_bytes <= self.engine.ledger.room_bytes

    def _up_bytes_per_s(self) -> float:
        meter = self.engine.frames.lanes["read"].meter
        return meter.moved_bytes / meter.busy_s if meter.busy_s else UNMEASURED_BYTES_PER_S

    def end_pass(self) -> None:
        """User code runs from here."""
        self.engine.frames.scrutiny.watching = False
        if not self.trust_versions:
            self.engine.retire()

    def end_step(self) -> None:
        """The update begins: every copy is about to be outdated."""
        self.engine.retire()
        self.steps.end()
        self._set_aside_excess()

    def present_bytes(self) -> int:
        """What the ledger knows of, without what it has debited for the next step to make."""
        self.engine.collect()
        coming_bytes = self.residents.coming_bytes if self.residents is not None else 0
        return self.engine.ledger.used_bytes - coming_bytes

    def _set_aside_excess(self) -> None:
        """What a watched step took beyond the budget is kept free from now on, and that is said.

        What the step itself cannot do without is not: it would never run again.
        """
        ledger, watch = self.engine.ledger, self.steps.watch
        if not isinstance(watch, AllocatorWatch):
            return
        over_bytes = watch.held_bytes - ledger.budget_bytes - self.aside_bytes
        if over_bytes <= 0:
            return
        free_bytes = min(over_bytes, self._spare_bytes())
        self.aside_bytes += over_bytes
        ledger.fixed_bytes += free_bytes
        print(
            f"offload: a watched step took {format_size(over_bytes)} more of {self.place} than "
            "device_memory, in operations that nobody can look into; "
            f"{format_size(free_bytes)} is kept free for them from now on",
            file=sys.stderr,
        )

    def _spare_bytes(self) -> int:
        """Room that training steps, as recorded, do not need, were all weights to go home."""
        residents = self.residents
        traces = (self.steps.tracks[Kind.TRAIN].trace, residents.seen if residents else None)
        least_bytes = max((smallest_bytes(t) for t in traces if t and t.moments), default=0)
        resident_bytes = residents.bytes if residents else 0
        return max(self.engine.ledger.capacity_bytes + resident_bytes - least_bytes, 0)

    def settle_sent(self, tape: Tape | None) -> None:
        """Gradients that have been awaited take no device memory any more."""
        for start_s, end_s, size_bytes in self.outgoing.over() if self.outgoing else ():
            self.engine.ledger.give_other(size_bytes)
            if tape is not None:
                tape.copied("d2h", start_s, size_bytes, end_s)

    def await_sent(self, tape: Tape | None) -> None:
        """A pass ends: no gradient is on its way any more."""
        if self.outgoing is not None:
            self.outgoing.wait_all()
        self.settle_sent(tape)

    def tier_stats(self) -> dict[str, int]:
        """Bytes held on the device."""
        ledger = self.engine.ledger
        return {
            "budget_bytes": ledger.budget_bytes,
            "used_bytes": ledger.used_bytes,
            "peak_bytes": ledger.peak_bytes,
            "peak_other_bytes": ledger.peak_other_bytes,
            "resident_bytes": self.residents.bytes if self.residents is not None else 0,
        }

    def stats(self, kind: Kind) -> dict[str, Any]:
        """What the copies to the device did; see docs/stats.md."""
        counters, forecast = self.engine.counters, self.steps.tracks[kind].forecast
        meter = self.engine.frames.lanes["read"].meter
        down = self.outgoing.lane.meter if self.outgoing is not None else None
        return {
            "uploaded_bytes": meter.moved_bytes,
            "busy_s": meter.busy_s,
            "pinned_bytes": self.engine.frames.pinned_bytes,
            "downloaded_bytes": down.moved_bytes if down is not None else 0,
            "download_busy_s": down.busy_s if down is not None else 0.0,
            "stall_s": counters.stall_s["read"],
            "demand_uploads": counters.demand_loads,
            "planned_uploads": counters.planned_loads,
            "forced_evictions": counters.forced_evictions,
            "forecast": asdict(forecast) if forecast is not None else None,
        }

    def close(self) -> None:
        """Free the frames and stop the lanes."""
        self.await_sent(None)
        if self.outgoing is not None:
            self.outgoing.lane.close()
        self.engine.retire()
        self.engine.frames.close()
