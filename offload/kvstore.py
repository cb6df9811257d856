"""What all KV caches of a run share: one limit, one file, and the order in which layers are read.

The order is learnt: what followed a history the last time will follow it again, whichever cache it
belongs to, so several caches that pass through the layers together are read ahead as one is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from offload.errors import BudgetError, OffloadError, SpillError
from offload.kvroom import Block, BlockFile, Room, memory_of
from offload.prefetch.cache import Line, spread


class Lined(Protocol):
    """What the store knows of one layer's history."""

    blocks: list[Block]
    tail: Block | None  # that is being filled
    planned: int  # blocks that there will be once it was added to
    keep: int  # leading blocks that stay in memory: decided here

    @property
    def block_bytes(self) -> int: ...

    @property
    def working_bytes(self) -> int:
        """Of all its keys and values side by side, as attention wants them."""
        ...

    @property
    def tail_bytes(self) -> int:
        """Of the block that is being filled."""
        ...

    def close(self) -> None:
        """Forget its blocks, and leave the store."""
        ...


class Beyond(Protocol):
    """What a device that computes has of the histories."""

    def stats(self) -> dict[str, Any]:
        """Bytes and events."""
        ...

    def close(self) -> None:
        """There is no history any more."""
        ...


@dataclass(slots=True)
class KVCounters:
    """What happened, for stats and for tests that must know that it did."""

    ahead_reads: int = 0
    demand_reads: int = 0
    evicted_blocks: int = 0


class Order:
    """Which history follows which."""

    def __init__(self) -> None:
        self.current: Lined | None = None
        self._after: dict[int, Lined] = {}  # by id: histories leave before they die

    def enter(self, history: Lined) -> None:
        if self.current is not None:
            self._after[id(self.current)] = history
        self.current = history

    @property
    def coming(self) -> Lined | None:
        """What will be read after the current one, if that is known."""
        return self._after.get(id(self.current))

    def forget(self, history: Lined) -> None:
        self._after = {
            k: h for k, h in self._after.items() if k != id(history) and h is not history
        }
        if self.current is history:
            self.current = None


class KVStore:
    """Residency of all histories. ``room`` and ``file`` do as they are told here."""

    def __init__(self, room: Room, file: BlockFile) -> None:
        self.room = room
        self.file = file
        self.counters = KVCounters()
        self.histories: list[Lined] = []
        self.order = Order()
        self.side_by_side = 1  # caches whose layers' keys and values are lent at the same time
        self.beyond: Beyond | None = None
        self._ahead_bytes: int | None = None  # None: to be decided anew
        self._wanted: deque[Block] = deque()  # to be read, in this order
        self._streamed: dict[Block, None] = {}  # read, or being read, not to stay
        self._leaving: deque[Block] = deque()  # being written, to be dropped then

    # -- histories --------------------------------------------------------------------------

    def add(self, history: Lined) -> None:
        self.histories.append(history)
        self._ahead_bytes = None

    def remove(self, history: Lined) -> None:
        """Its blocks were forgotten before."""
        if history not in self.histories:
            return
        self.histories.remove(history)
        self.order.forget(history)
        self._wanted.clear()
        self._ahead_bytes = None
        if not self.histories:
            self.room.limit_bytes = self.room.given_bytes
            self.room.trim()
            self.file.close()
            if self.beyond is not None:
                self.beyond.close()

    def limit(self, limit_bytes: int, *, hard: bool) -> None:
        """Share another limit from now on."""
        self.room.limit(limit_bytes, hard=hard)
        self._ahead_bytes = None

    def changed(self) -> None:
        """The number of blocks has changed, or will: decide anew before the next is read."""
        self._ahead_bytes = None

    def enter(self, history: Lined) -> None:
        """A history is about to be read whole: have its blocks read, and those of the next.

        Raises OffloadError where it was closed.
        """
        if history not in self.histories:
            raise OffloadError("this KV cache was closed together with its run: make another")
        self.poll()
        self.order.enter(history)
        coming = self.order.coming
        if self._ahead_bytes is None:
            self._decide()
        near = [b for h in (history, coming) if h is not None for b in h.blocks]
        for block in self._streamed.keys() - set(near):  # foreseen, but other things came
            self._drop_streamed(block)
        # A copy on the device serves its next use; a read meanwhile would be nobody's to await.
        self._wanted = deque(dict.fromkeys(b for b in near if b.is_away and b.copy is None))
        self._pump()

    # -- blocks -----------------------------------------------------------------------------

    def lend(self, size_bytes: int) -> Tensor:
        """uint8 memory for keys and values side by side; see `Room.lend`."""
        return self.room.lend(size_bytes)

    def new_block(self, size_bytes: int) -> Block:
        """A block in memory, of nobody's history yet. Raises BudgetError."""
        frame = self.room.take(size_bytes)
        return Block(size_bytes, frame, memory_of(frame))

    def fetch(self, block: Block) -> Tensor:
        """Its bytes in memory, until the next call. Raises SpillError, BudgetError."""
        if block.is_away:
            self.counters.demand_reads += 1
            self._load(block)
        if block.loading is not None:
            try:
                self.file.finish_load(block)
            except SpillError:
                self._streamed.pop(block, None)
                self._drop(block)
                raise
        assert block.memory is not None
        return block.memory

    def release(self, block: Block, *, keep: bool) -> None:
        """It was used: it stays, or makes room for what is read next."""
        self._streamed.pop(block, None)
        if not keep:
            self.leave(block)
        self._pump()

    def leave(self, block: Block) -> None:
        """Let a block go: at once where the file has it, else after its write."""
        if block.is_away or block.saving is not None or not self.file.exists:
            return
        if block.offset >= 0:
            self._evict(block)
        else:
            self.file.start_save(block)
            self._leaving.append(block)

    def forget(self, block: Block) -> None:
        """Nobody wants its contents any more."""
        if block.copy is not None:
            block.copy.discard()
        with contextlib.suppress(SpillError):
            if block.saving is not None:
                self._leaving.remove(block)
                self.file.finish_save(block)
            if block.loading is not None:
                self.file.finish_load(block)
        self._streamed.pop(block, None)
        self._drop(block)
        self.file.free(block)

    def poll(self) -> None:
        """Drop what has been written. Raises SpillError where that failed."""
        while self._leaving and (ticket := self._leaving[0].saving) is not None and ticket.done:
            self._finish_leaving()

    # -- room -------------------------------------------------------------------------------

    def shrink(self) -> bool:
        """Let frames become idle; False when there is nothing left to give up."""
        if self._leaving:
            self._finish_leaving()
            return True
        return self._shed()

    def relieve(self, desperate: bool) -> bool:
        """Give memory back to the engine; ``desperate``: of what is kept, too, and for good."""
        if not self.room.account.owed_bytes:
            return False  # whatever it gave up, the engine would have no more room
        if self.room.trim(sparing=not desperate):
            return True
        if self._leaving:
            self._finish_leaving()
            return self.room.trim(sparing=not desperate)
        if not desperate or not self._shed():
            return False
        self.room.trim()
        self.room.limit_bytes = min(self.room.limit_bytes, self.room.held_bytes)
        self._ahead_bytes = None
        return True

    def close(self) -> None:
        """Close what is open, give memory back, close the file."""
        for history in list(self.histories):
            history.close()
        self.room.trim()
        self.file.close()
        if self.beyond is not None:
            self.beyond.close()

    def stats(self) -> dict[str, Any]:
        """Bytes and events; see docs/stats.md."""
        return {
            "held_bytes": self.room.held_bytes,
            "limit_bytes": self.room.limit_bytes,
            "disk_bytes": self.file.used_bytes,
            "written_bytes": self.file.written_bytes,
            "read_bytes": self.file.read_bytes,
            **asdict(self.counters),
            "device": self.beyond.stats() if self.beyond is not None else None,
        }

    def _shed(self) -> bool:
        """Lose what was read ahead, last first; then a block of whoever holds most."""
        if self._streamed:
            self._drop_streamed(next(reversed(self._streamed)))
            return True
        if not self.file.exists:
            return False
        others = [h for h in self.histories if h is not self.order.current] or self.histories
        held = [[b for b in h.blocks if not b.is_away] for h in (*others, *self.histories)]
        blocks = max(held, key=len, default=[])
        if not blocks:
            return False
        self.leave(blocks[-1])
        while self._leaving:
            self._finish_leaving()
        return True

    def _decide(self) -> None:
        """Shares for all histories; what is beyond them leaves."""
        self.room.trim(sparing=True)  # shorter memory that was lent before histories grew
        fixed_bytes = sum(h.tail_bytes for h in self.histories) + self._lent_bytes()
        lines = [Line(h.planned, _largest_block(h)) for h in self.histories]
        decided = spread(lines, max(self.room.limit_bytes - fixed_bytes, 0))
        self._ahead_bytes = decided.ahead_bytes
        for history, keep in zip(self.histories, decided.keep, strict=True):
            history.keep = keep
            for block in history.blocks[keep:]:
                if not block.is_away and block not in self._streamed:
                    self.leave(block)

    def _lent_bytes(self) -> int:
        """Of as many layers as are lent at once: one of each cache, which are of about one size."""
        sizes = sorted((h.working_bytes for h in self.histories), reverse=True)
        return sum(sizes[:: -(-len(sizes) // self.side_by_side) or 1])

    def _pump(self) -> None:
        """Read ahead as far as there is room that costs nobody anything."""
        while self._wanted:
            block = self._wanted[0]
            if block.is_away:
                ahead_bytes = sum(b.size_bytes for b in self._streamed) + block.size_bytes
                if self._streamed and ahead_bytes > (self._ahead_bytes or 0):
                    return
                if not self.room.within_limit(block.size_bytes):
                    return
                try:
                    self._load(block)
                except BudgetError:
                    return
                self.counters.ahead_reads += 1
            self._wanted.popleft()

    # -- single moves -----------------------------------------------------------------------

    def _load(self, block: Block) -> None:
        self.file.start_load(block, self.room.take(block.size_bytes))
        self._streamed[block] = None

    def _drop_streamed(self, block: Block) -> None:
        del self._streamed[block]
        self._drop(block)

    def _finish_leaving(self) -> None:
        block = self._leaving.popleft()
        self.file.finish_save(block)
        self._evict(block)

    def _evict(self, block: Block) -> None:
        self.counters.evicted_blocks += 1
        self._drop(block)

    def _drop(self, block: Block) -> None:
        if block.copy is not None:
            block.copy.read()
        if block.loading is not None:
            with contextlib.suppress(SpillError):  # it will be read again, and say so then
                self.file.finish_load(block)
        if block.frame is not None:
            self.room.give(block.frame)
        block.frame = block.memory = None


def _largest_block(history: Lined) -> int:
    """Blocks that were filled when there were more rows are larger than those to come."""
    return max((b.size_bytes for b in history.blocks), default=history.block_bytes)
