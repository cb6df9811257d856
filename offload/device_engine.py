"""The engine of the device level."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn, cast

from torch import Tensor, nn

from offload.device import DeviceSpace
from offload.engine import Engine
from offload.errors import BudgetError
from offload.ledger import Ledger, Other
from offload.prefetch.plan import Ops
from offload.prefetch.trace import Access, Need, Phase
from offload.tiers.home import Chunk, HomeSpace
from offload.tiers.spec import format_size


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
        self.stuck_bytes: Callable[[], int] = lambda: 0  # of that, what graphs hold

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
        stuck_bytes, stuck = self.stuck_bytes(), ""
        if stuck_bytes:
            stuck = (
                f"weights that live there {format_size(stuck_bytes)} (this pass uses them: they "
                "go home before the next one), "
            )
        raise BudgetError(
            f"device tier: {what} needs {format_size(size_bytes)} more, but of the budget of "
            f"{format_size(ledger.budget_bytes)} weights in use take {format_size(held)}, "
            f"{stuck}activations {format_size(ledger.other_bytes)}, buffers "
            f"{format_size(ledger.fixed_bytes - stuck_bytes)}; this step needs device_memory of at "
            f"least {format_size(least)}: give that, or {self.outlook.remedy}",
            tier="device",
            needed_bytes=least,
            given_bytes=ledger.budget_bytes,
            smallest_bytes=least,
        )
