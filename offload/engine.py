"""The engine: the one owner of residency. Serves what a moment needs and follows the plan.

The steady state is ``need``: issue what the plan has for this moment, wait for what is needed,
note the moment. Everything else here makes room or keeps the queues moving. All methods run on
one thread; lane workers only move bytes.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable

from offload.counters import Counters
from offload.errors import SpillError
from offload.ledger import Ledger, Other
from offload.moves import Moves
from offload.outlook import Outlook
from offload.prefetch.plan import Ops
from offload.prefetch.trace import Access, Need, Phase
from offload.record import Follower, Recorder
from offload.tape import Mark, Tape
from offload.tenants import Tenants
from offload.tiers.home import Backing, Chunk, HomeSpace


class Engine:
    """Decides what is in memory, of one home space under one ledger. ``is_dead``: see Moves."""

    def __init__(
        self, space: HomeSpace, ledger: Ledger, is_dead: Callable[[int], bool] = lambda _: False
    ) -> None:
        self.space = space
        self.ledger = ledger
        self.moves = Moves(space, ledger, is_dead)
        self.outlook = Outlook()
        self.tenants = Tenants()
        self.recorder: Recorder | None = None
        self.follower: Follower | None = None
        self.tape: Tape | None = None  # while somebody records what a step does
        self._queue: deque[int] = deque()  # planned loads that wait for room
        self._last: tuple[Need, ...] = ()  # what this moment was promised

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self.moves.counters

    # -- the steady state -------------------------------------------------------------------

    def need(self, phase: Phase, needs: tuple[Need, ...]) -> None:
        """Make chunks resident for the work that follows; raises BudgetError when they cannot be.

        Needs that the present moment has already met make no new moment.
        """
        if self._covered(needs):
            return
        self.moves.trust.phase = phase
        if self.tape is not None:
            self.tape.enter()
        if self.recorder is not None:
            self.recorder.enter()
        if self.follower is not None:
            for ops in self.follower.advance(phase, needs):
                self._issue(ops)
        self._pump()
        keep = {n.chunk for n in needs}
        for need in needs:
            self._serve(self.space.chunks[need.chunk], need.access, keep)
        self._hold_back(keep)
        if self.follower is not None and self.follower.before_user_code:
            self.settle()
        self._pump()
        self._last = needs
        if self.recorder is not None:
            self.recorder.leave(phase, needs, self.ledger.other_bytes)
        if self.tape is not None:
            self.tape.leave(phase, needs)

    def _covered(self, needs: tuple[Need, ...]) -> bool:
        """Whether the last moment already made all this true (and nothing has been lost since)."""
        return all(
            any(n.chunk == m.chunk and (n.access == m.access or n.access is Access.READ)
                for m in self._last)
            and self.moves.stays(n.chunk)
            for n in needs
        )  # fmt: skip

    def _serve(self, chunk: Chunk, access: Access, keep: set[int]) -> None:
        if self.space.disk is None:
            return  # every chunk is in memory for good, and none is ever a victim
        self.moves.stay(chunk)
        if chunk.loading is not None:
            # Where reading ahead failed the fault may have passed: it is read again, on demand.
            with contextlib.suppress(SpillError):
                self.moves.install(chunk)
        if chunk.backing is Backing.FILE and access is not Access.FRESH:
            self._make_room(chunk.size_bytes, keep)
            self.counters.demand_loads += 1
            self.moves.start_load(chunk)
            self.moves.install(chunk)
        elif chunk.backing is not Backing.RAM:
            self._make_room(chunk.size_bytes, keep)
            self.moves.make_fresh(chunk)
        self.moves.used(chunk, access)

    def _issue(self, ops: Ops) -> None:
        self._send_home(ops.drops)
        self._queue.extend(ops.loads)

    def _pump(self) -> None:
        """Finish evictions whose write is done; start queued loads for which there is room."""
        self.moves.drop_written()
        while self._queue:
            chunk = self.space.chunks[self._queue[0]]
            self.moves.stay(chunk)
            if chunk.backing is Backing.FILE and chunk.loading is None:
                if self.ledger.room_bytes < chunk.size_bytes + self._coming_bytes():
                    return
                self.counters.planned_loads += 1
                self.moves.start_load(chunk)
            self._queue.popleft()

    # -- room -------------------------------------------------------------------------------

    def take_other(self, size_bytes: int, what: str, kind: Other = Other.ACTIVATIONS) -> None:
        """Debit memory that is not chunks, evicting for it. Raises BudgetError."""
        if self.ledger.room_bytes < size_bytes:
            self._make_room(size_bytes, {n.chunk for n in self._last}, what)
        self.ledger.take_other(size_bytes, kind)
        if self.recorder is not None:
            self.recorder.see_other(self.ledger.other_bytes)

    def make_room_for(self, size_bytes: int, what: str) -> None:
        """Evict until so much could be taken. Raises BudgetError."""
        if self.ledger.room_bytes < size_bytes:
            self._make_room(size_bytes, {n.chunk for n in self._last}, what)

    def _coming_bytes(self) -> int:
        """Other memory that this moment will take before the next: as recorded, else as feared.

        In a recorded backward pass nobody knows where the next gradient appears, so there is
        always room for the largest.
        """
        if self.follower is not None and self.follower.cursor >= 0:
            planned = self.follower.trace.moments[self.follower.cursor].other_bytes
            return max(planned - self.ledger.other_bytes, 0)
        return self.outlook.largest_gradient_bytes if self._phase.in_backward else 0

    def _hold_back(self, keep: set[int]) -> None:
        """Make that room where it can be had; where it cannot, taking it will say so."""
        coming = self._coming_bytes()
        while self.ledger.room_bytes < coming:
            if self.moves.await_one():
                continue
            victim = self._victim(keep | {n.chunk for n in self._last})
            if victim is None:
                break
            self.moves.evict(victim)
        self.ledger.hold(coming)

    def _make_room(self, size_bytes: int, keep: set[int], what: str = "a chunk") -> None:
        while self.ledger.room_bytes < size_bytes:
            if self.tenants.relieve(False) or self.moves.await_one():
                continue
            victim = self._victim(keep)
            if victim is not None:
                self.counters.forced_evictions += self.follower is not None
                self.moves.evict(victim)
            elif not self._abandon_a_load(keep) and not self.tenants.relieve(True):
                self._refuse(size_bytes, keep, what)

    def _victim(self, keep: set[int]) -> Chunk | None:
        """The resident chunk to lose: furthest next use when a trace is known, else the oldest.

        What the previous moment needed goes last: its operation may still be reading.
        """
        recent = {n.chunk for n in self._last}
        ids = [c for c in self.moves.resident if c not in keep]
        ids = [c for c in ids if c not in recent] or ids
        if not ids:
            return None
        return self.space.chunks[max(ids, key=self.follower.next_use) if self.follower else ids[0]]

    def _abandon_a_load(self, keep: set[int]) -> bool:
        """Give up the prefetched copy that is wanted last."""
        pending = [c for c in self.space.loads() if c.id not in keep]
        if not pending:
            return False
        follower = self.follower
        chunk = pending[-1] if follower is None else max(
            pending, key=lambda c: follower.next_use(c.id)
        )  # fmt: skip
        self.space.abandon_load(chunk)
        return True

    @property
    def _phase(self) -> Phase:
        return self.moves.trust.phase

    def _refuse(self, size_bytes: int, keep: set[int], what: str) -> None:
        held = sum(self.space.chunks[c].size_bytes for c in keep & self.moves.resident.keys())
        raise self.outlook.refusal(self.ledger, held, size_bytes, what)

    # -- boundaries -------------------------------------------------------------------------

    def await_compute(self) -> None:
        """Wait for what is computed. On the CPU it is over when its call returns."""

    def settle(self) -> None:
        """Await every write, so that user code runs with no copy of anything in flight."""
        while self.moves.await_one():
            pass

    def leave_forward(self) -> None:
        """The model's forward pass is over: user code runs."""
        self.settle()
        self._end_moment()
        if self.tape is not None:
            self.tape.mark(Mark.FORWARD_ENDS)

    def begin(self, recorder: Recorder, follower: Follower | None) -> None:
        """A step begins, recorded, and planned where a plan is known."""
        self.recorder, self.follower = recorder, follower
        self._queue.clear()
        self._end_moment()
        if follower is None:
            return
        follower.restart()
        keep = follower.plan.resident_at_start
        spare_bytes = self.ledger.capacity_bytes - follower.plan.forecast.peak_bytes
        # What another step had in memory stays where this one leaves room: the latest used first.
        others = [c for c in self.moves.resident if c not in keep and self.moves.stays(c)]
        for c in reversed(others):
            spare_bytes -= self.space.chunks[c].size_bytes
            if spare_bytes < 0:
                self.moves.evict(self.space.chunks[c])
        # What the plan has in memory from the step before, but is not there (a first replay).
        missing = [c for c in keep if self.space.chunks[c].backing is Backing.FILE]
        self._queue.extend(sorted(missing, key=follower.next_use))
        self._pump()

    def finish(self) -> None:
        """A step ends: what the plan still wants is issued, writes are awaited."""
        if self.follower is not None:
            for ops in self.follower.rest():
                self._issue(ops)
        self._pump()
        self.settle()
        self._pump()
        self._end_moment()

    def _end_moment(self) -> None:
        """Code of the user's ran or will run: nothing that was so is taken for granted."""
        self._last = ()
        self.moves.trust.forget()

    def evict(self, chunks: Iterable[int]) -> None:
        """Send these chunks home now (for tests, and for a device tier that needs the room)."""
        self._send_home(chunks)
        self.settle()

    def _send_home(self, chunks: Iterable[int]) -> None:
        for c in chunks:
            if self.moves.stays(c):
                self.moves.evict(self.space.chunks[c])

    def evict_all(self) -> None:
        """Send everything home and free the frames."""
        self.forget_gone()
        self.evict(list(self.moves.resident))
        self.space.pool.trim()

    def give_up_loads(self) -> None:
        """Abandon what is being read and await what is being written: before closing."""
        self._queue.clear()
        for chunk in self.space.loads():
            self.space.abandon_load(chunk)
        self.settle()

    def forget_gone(self) -> None:
        """Bring everything in flight to rest, without evicting: before closing or re-planning."""
        self._queue.clear()
        for chunk in list(self.space.loads()):
            self.moves.install(chunk)
        self.settle()
