"""What the KV cache holds and where: frames debited in the ledger, blocks, and their file.

Accounting (`Room`) and moving (`BlockFile`) only; what stays and what goes is kvstore.py's.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload.engine import Engine
from offload.errors import BudgetError, SpillError
from offload.ledger import Other
from offload.swap import TICKET_ID
from offload.swap_disk import SwapFile
from offload.tiers import vm
from offload.tiers.disk import Disk, DiskFull
from offload.tiers.frames import Frame, FramePool
from offload.tiers.lane import Lane, Ticket
from offload.tiers.spec import format_size, round_up

WHAT = "the KV cache"


class Copy(Protocol):
    """Of a block, on a device that computes."""

    def read(self) -> None:
        """Wait until the block's own memory is not read any more."""
        ...

    def discard(self) -> None:
        """Nobody wants it any more."""
        ...


@dataclass(slots=True, eq=False)
class Block:
    """Bytes in a frame, in the file, in both, or on their way."""

    size_bytes: int  # of its frame and of its slot: whole pages
    frame: Frame | None = None
    memory: Tensor | None = None  # uint8 [size_bytes], over the frame
    offset: int = -1  # in the file; -1: not written
    checksum: int = 0
    loading: Ticket | None = None
    saving: Ticket | None = None
    copy: Copy | None = None

    @property
    def is_away(self) -> bool:
        """Whether its bytes are in the file alone."""
        return self.frame is None


class Account:
    """What the ledger was told of the cache, which may have been paid for in advance."""

    def __init__(self, engine: Engine) -> None:
        self.owed_bytes = 0  # in the ledger now, beyond what was prepaid
        self._engine = engine
        self._taken_bytes = 0
        self._prepaid_bytes = 0

    def change(self, size_bytes: int) -> None:
        """So much more is held, or less where it is negative. Raises BudgetError."""
        self._settle(size_bytes, 0)

    def prepaid(self, size_bytes: int) -> None:
        """So much is in the ledger already, taken by whoever says so. Raises BudgetError."""
        self._settle(0, size_bytes - self._prepaid_bytes)

    def lacks(self, size_bytes: int) -> bool:
        """Whether weights would have to leave for so much."""
        return self._engine.ledger.room_bytes < self._due_bytes(size_bytes) - self.owed_bytes

    def _settle(self, taken_bytes: int, prepaid_bytes: int) -> None:
        due_bytes = self._due_bytes(taken_bytes - prepaid_bytes) - self.owed_bytes
        if due_bytes > 0:  # the engine may ask the cache for room meanwhile
            self._engine.take_other(due_bytes, WHAT, Other.KV)
            self.owed_bytes += due_bytes
        self._taken_bytes += taken_bytes
        self._prepaid_bytes += prepaid_bytes
        spare_bytes = self.owed_bytes - self._due_bytes(0)
        if spare_bytes > 0:
            self._engine.ledger.give_other(spare_bytes, Other.KV)
            self.owed_bytes -= spare_bytes

    def _due_bytes(self, more_bytes: int) -> int:
        return max(self._taken_bytes - self._prepaid_bytes + more_bytes, 0)


class Room:
    """Frames, each debited in the engine's ledger before it exists, within a limit of their own.

    ``hard``: the limit is the user's; otherwise it gives way where the engine has room. The limit
    that is kept to may be lowered for the sake of weights.
    ``shrink`` gives up something, False when there is nothing; ``squeezed`` is told when weights
    have to make room.
    """

    def __init__(
        self, engine: Engine, limit_bytes: int, hard: bool,
        shrink: Callable[[], bool], squeezed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.limit(limit_bytes, hard=hard)
        self.account = Account(engine)
        self._shrink = shrink
        self._squeezed = squeezed
        self._pool = FramePool(poison=engine.space.pool.poison)
        self._lent_bytes = 0  # of the frame lent last: it will be wanted again
        self._returned: deque[Frame] = deque()  # appended to by finalizers, on any thread

    @property
    def held_bytes(self) -> int:
        """All frames, idle ones too: what the ledger was told of."""
        return self._pool.total_bytes

    def limit(self, limit_bytes: int, *, hard: bool) -> None:
        """Another limit."""
        self.limit_bytes = self.given_bytes = limit_bytes
        self.hard_bytes = limit_bytes if hard else None

    def within_limit(self, size_bytes: int) -> bool:
        """Whether a frame of this size can be had without giving up another."""
        self.poll()
        fits = self.held_bytes + size_bytes <= self.limit_bytes
        return fits or self._pool.has_idle(size_bytes)

    def take(self, size_bytes: int) -> Frame:
        """A frame. Raises BudgetError where neither the cache nor the weights can make room."""
        self.poll()
        self._keep_within_limit(size_bytes)
        if self._pool.has_idle(size_bytes):
            return self._pool.take(size_bytes)
        if self.account.lacks(size_bytes):
            self._squeezed()
        self.account.change(size_bytes)
        before_bytes = self.held_bytes
        frame = self._pool.take(size_bytes)
        if self.held_bytes == before_bytes:  # one had become idle meanwhile
            self.account.change(-size_bytes)
        return frame

    def give(self, frame: Frame) -> None:
        self._pool.give(frame)

    def lend(self, size_bytes: int) -> Tensor:
        """uint8 [size_bytes] over a frame that comes back when the last view of it has died."""
        whole_bytes = round_up(size_bytes, vm.PAGE_BYTES)
        self._lent_bytes = whole_bytes
        frame = self.take(whole_bytes)
        buffer = vm.buffer_at(frame.address, size_bytes)
        weakref.finalize(buffer, self._returned.append, frame).atexit = False
        with torch.inference_mode(False):
            return torch.frombuffer(buffer, dtype=torch.uint8)

    def debit(self, size_bytes: int) -> None:
        """Memory that others hold for the cache: more, or less where it is negative."""
        self.account.change(size_bytes)

    def poll(self) -> None:
        """Take back what was lent and is not viewed any more."""
        while self._returned:
            self._pool.give(self._returned.popleft())

    def trim(self, *, sparing: bool = False) -> bool:
        """Give idle frames back to the system; False when there were none.

        ``sparing``: but not the one that is lent to layer after layer.
        """
        self.poll()
        before_bytes, spare_bytes = self._pool.total_bytes, self._lent_bytes
        keep_bytes = spare_bytes if sparing and self._pool.has_idle(spare_bytes) else 0
        self._pool.trim(keep_bytes, sparing=spare_bytes)
        freed_bytes = before_bytes - self._pool.total_bytes
        self.account.change(-freed_bytes)
        return bool(freed_bytes)

    def _keep_within_limit(self, size_bytes: int) -> None:
        while (needed_bytes := self.held_bytes + size_bytes) > self.limit_bytes:
            if self._pool.has_idle(size_bytes):
                return
            if self.trim(sparing=True) or self._shrink() or self.trim():
                continue
            if self.hard_bytes is not None and needed_bytes > self.hard_bytes:
                raise BudgetError(
                    f"host tier: {WHAT} needs {format_size(needed_bytes)} so far, its blocks that "
                    "are being filled and one layer's whole history among it, but memory is "
                    f"{format_size(self.hard_bytes)}: give kv_cache(memory=...), or kv_memory of "
                    "generate, at least that, fewer rows, or kv_dtype='int4'",
                    tier="host",
                    needed_bytes=needed_bytes,
                    given_bytes=self.hard_bytes,
                    smallest_bytes=needed_bytes,
                )
            self.limit_bytes = needed_bytes


class BlockFile:
    """Moves blocks to and from a spill file of their own; made when the first is written."""

    def __init__(self, lanes: dict[str, Lane], storage: SwapFile | None) -> None:
        self.written_bytes = 0
        self.read_bytes = 0
        self._lanes = lanes
        self._storage = storage
        self._disk: Disk | None = None
        self._slots: defaultdict[int, list[int]] = defaultdict(list)

    @property
    def exists(self) -> bool:
        """Whether there is a disk tier."""
        return self._storage is not None

    @property
    def used_bytes(self) -> int:
        return self._disk.used_bytes if self._disk is not None else 0

    def start_save(self, block: Block) -> None:
        """Begin to write a block that is in memory. Raises SpillError when the disk is full."""
        assert block.frame is not None
        block.offset = self._take_slot(block.size_bytes)
        disk, address, size, at = self._disk, block.frame.address, block.size_bytes, block.offset
        assert disk is not None
        block.saving = Ticket(TICKET_ID)
        self.written_bytes += size
        self._lanes["write"].submit(block.saving, lambda: disk.write(address, size, at), size)

    def finish_save(self, block: Block) -> None:
        """Await the write. Raises SpillError; the block is then in memory alone."""
        assert block.saving is not None
        ticket, block.saving = block.saving, None
        try:
            self._lanes["write"].wait(ticket)
        except OSError as error:
            self.free(block)
            raise SpillError(f"{WHAT} could not be written to the spill file: {error}") from error
        block.checksum = ticket.result

    def start_load(self, block: Block, frame: Frame) -> None:
        """Begin to read a block into a frame."""
        disk, size, at = self._disk, block.size_bytes, block.offset
        assert disk is not None
        block.frame, block.memory = frame, memory_of(frame)
        block.loading = Ticket(TICKET_ID)
        self.read_bytes += size
        self._lanes["read"].submit(block.loading, lambda: disk.read(frame.address, size, at), size)

    def finish_load(self, block: Block) -> None:
        """Await the read. Raises SpillError for what is not what was written."""
        assert block.loading is not None
        ticket, block.loading = block.loading, None
        try:
            self._lanes["read"].wait(ticket)
            if ticket.result != block.checksum:
                raise OSError(f"what came back from offset {block.offset} is not what was written")
        except OSError as error:
            raise SpillError(f"{WHAT} could not be read from the spill file: {error}") from error

    def free(self, block: Block) -> None:
        """Its slot may be used again."""
        if block.offset >= 0:
            self._slots[block.size_bytes].append(block.offset)
            block.offset = -1

    def close(self) -> None:
        """Nothing may be on its way. What is written afterwards goes to a new file."""
        if self._disk is not None:
            self._disk.close()
            self._disk = None
            self._slots.clear()

    def _take_slot(self, size_bytes: int) -> int:
        if self._slots[size_bytes]:
            return self._slots[size_bytes].pop()
        assert self._storage is not None
        if self._disk is None:
            self._disk = self._storage.open()
        try:
            return self._disk.grow(size_bytes)
        except DiskFull as error:
            raise SpillError(f"{WHAT}: {error.strerror}") from error


def memory_of(frame: Frame) -> Tensor:
    """uint8 over a frame; ours alone, so that nobody holds it when the frame goes."""
    with torch.inference_mode(False):
        buffer = vm.buffer_at(frame.address, frame.size_bytes)
        return torch.frombuffer(buffer, dtype=torch.uint8)
