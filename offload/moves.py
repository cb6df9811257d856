"""Single moves of chunks: which are in memory, which are leaving it, and what a move may meet.

Where they go and when is the engine's decision. A transfer that fails names the chunk, and what a
move waits for is charged to its cause.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from offload.counters import Counters
from offload.errors import SpillError
from offload.ledger import Ledger
from offload.prefetch.trace import Access
from offload.tiers.home import Chunk, HomeSpace
from offload.trust import Trust


class Moves:
    """Of one home space under one ledger.

    ``is_dead``: tells whether a chunk's contents matter to nobody (a cleared gradient).
    ``resident``: least recently needed first, those that are leaving among them.
    """

    def __init__(self, space: HomeSpace, ledger: Ledger, is_dead: Callable[[int], bool]) -> None:
        self.is_dead = is_dead
        self.counters = Counters()
        self.trust = Trust()
        self.resident: OrderedDict[int, None] = OrderedDict()
        self._leaving: dict[int, Chunk] = {}  # being written, to be dropped after
        self._space = space
        self._ledger = ledger

    def stays(self, chunk: int) -> bool:
        """Whether it is in memory and not about to leave."""
        return chunk in self.resident and chunk not in self._leaving

    def used(self, chunk: Chunk, access: Access) -> None:
        """A moment works on a resident chunk from now on."""
        chunk.dirty |= access is not Access.READ
        self.resident[chunk.id] = None
        self.resident.move_to_end(chunk.id)

    # -- in ---------------------------------------------------------------------------------

    def start_load(self, chunk: Chunk) -> None:
        """Begin reading a chunk, for which there is room."""
        self._prepare(chunk)
        self.trust.ordered(chunk.id)
        self._space.start_load(chunk)
        self._ledger.see()

    def install(self, chunk: Chunk) -> None:
        """It is in memory when this returns. Raises SpillError."""
        user_code = not self.trust.unseen(chunk.id)
        with self.counters.waiting("read", chunk.id), _naming(chunk, "read from"):
            self._space.install(chunk, user_code=user_code)
        self.resident[chunk.id] = None
        self.trust.came(chunk.id)

    def make_fresh(self, chunk: Chunk) -> None:
        """Memory for contents that are about to be written; there is room."""
        self._prepare(chunk)
        self._space.make_fresh(chunk)
        self._ledger.see()

    def _prepare(self, chunk: Chunk) -> None:
        idle = self._space.pool.has_idle(chunk.size_bytes)
        self._ledger.prepare_frame(chunk.size_bytes, idle=idle)

    # -- out --------------------------------------------------------------------------------

    def evict(self, chunk: Chunk) -> None:
        """Send a resident chunk home: at once where clean or dead, else after its write."""
        if self.is_dead(chunk.id):
            self.forget(chunk, dead=True)
        elif not chunk.dirty and self._is_unchanged(chunk):
            self.forget(chunk, dead=False)
        else:
            self._space.start_save(chunk)
            self._leaving[chunk.id] = chunk

    def stay(self, chunk: Chunk) -> None:
        """Where a chunk that is wanted again was to leave: let its write end, keep its pages."""
        if self._leaving.pop(chunk.id, None) is not None:
            with self.counters.waiting("write", chunk.id), _naming(chunk, "written to"):
                self._space.finish_save(chunk)

    def drop_written(self) -> None:
        """Finish evictions whose write is done."""
        for chunk in [c for c in self._leaving.values() if c.saving is not None and c.saving.done]:
            self._finish_leaving(chunk)

    def await_one(self) -> bool:
        """Wait for the write that began first; False: nothing is leaving."""
        chunk = next(iter(self._leaving.values()), None)
        if chunk is None:
            return False
        with self.counters.waiting("write", chunk.id):
            self._finish_leaving(chunk)
        return True

    def forget(self, chunk: Chunk, *, dead: bool) -> None:
        """A chunk's memory is free: its contents are at home, or matter to nobody."""
        try:
            self._space.drop(chunk, dead=dead)
        finally:
            self.resident.pop(chunk.id, None)  # gone even where its dropping had to complain
        self.counters.evictions += 1

    def _finish_leaving(self, chunk: Chunk) -> None:
        del self._leaving[chunk.id]
        try:
            self._space.finish_save(chunk)
        except OSError:  # still resident and dirty: a fault that has passed costs nothing
            self._space.start_save(chunk)
            with _naming(chunk, "written to"):
                self._space.finish_save(chunk)
        # Where user code may have written since it is written again.
        if not self.trust.quiet and not self._space.unchanged(chunk):
            chunk.dirty = True
        if chunk.dirty:
            self.evict(chunk)
        else:
            self.forget(chunk, dead=False)

    def _is_unchanged(self, chunk: Chunk) -> bool:
        if self.trust.untouched(chunk.id):
            return True
        with self.counters.waiting("checksum", chunk.id):
            return self._space.unchanged(chunk)


@contextmanager
def _naming(chunk: Chunk, how: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpillError(f"{chunk.label} could not be {how} the spill file: {error}") from error
