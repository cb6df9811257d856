"""Keys and values on a device that computes: frames for them, and the copies that fill those.

A layer's blocks cross on the lane of the weights, each into a frame of its own, and are put side
by side there, in memory that the layers share. So device memory holds one layer's keys and values,
and blocks on their way: of the layer that is put together, then of the next one, as far as the
host has them in memory. Whole blocks never change, so a copy stays right until its block is
forgotten; the block that is being filled crosses when its own layer's turn has come.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from offload.device_engine import DeviceEngine
from offload.errors import BudgetError, OffloadError, SpillError
from offload.kvroom import Account, Block
from offload.kvstore import KVStore, Lined
from offload.swap import TICKET_ID
from offload.tiers.arena import DeviceArena
from offload.tiers.copy import Copier, Mark
from offload.tiers.frames import Frame
from offload.tiers.lane import Lane, Ticket
from offload.tiers.spec import format_size

AHEAD_SHARE = 4  # one part in so many of device_memory, at most, is for blocks on their way


class DeviceRoom:
    """Frames of device memory, each debited in the device's ledger before it exists."""

    def __init__(self, engine: DeviceEngine) -> None:
        pool = engine.frames.pool
        self.account = Account(engine)
        self.arena = DeviceArena(pool.memory, poison=pool.poison)
        self._lent_bytes = 0  # of the frame lent last
        self._ahead_bytes = engine.ledger.capacity_bytes // AHEAD_SHARE

    @property
    def held_bytes(self) -> int:
        """All frames, idle ones too."""
        return self.arena.total_bytes

    def take(self, size_bytes: int) -> Frame:
        """A frame. Raises BudgetError where the weights cannot make room."""
        self.arena.collect()
        held_bytes = self.arena.memory.held_bytes(size_bytes)
        if self.arena.has_idle(held_bytes):
            return self.arena.take(held_bytes)
        self.account.change(held_bytes)
        before_bytes = self.held_bytes
        try:
            return self.arena.take(held_bytes)
        except MemoryError as error:
            raise OffloadError(
                "device_memory has room for keys and values, but torch's allocator has no "
                f"{format_size(held_bytes)}: others hold the device's memory, or it is in pieces. "
                f"Give less device_memory. ({error})"
            ) from error
        finally:  # not all of it where one had become idle meanwhile, or none could be had
            self.account.change(self.held_bytes - before_bytes - held_bytes)

    def take_ahead(self, size_bytes: int, others_bytes: int) -> Frame | None:
        """A frame beside those of ``others_bytes``; None where only others could make room."""
        self.arena.collect()
        held_bytes = self.arena.memory.held_bytes(size_bytes)
        if self.arena.has_idle(held_bytes):
            return self.arena.take(held_bytes)
        if others_bytes + held_bytes > self._ahead_bytes:
            return None
        try:
            return self.take(size_bytes)
        except BudgetError:
            self._ahead_bytes = others_bytes
            return None

    def lend(self, size_bytes: int) -> Tensor:
        """uint8 [size_bytes] over a frame that is idle again when no view of it lives."""
        held_bytes = self.arena.memory.held_bytes(size_bytes)
        if held_bytes != self._lent_bytes:
            self.trim()  # histories have grown: the frame of before is of no use
            self._lent_bytes = held_bytes
        frame = self.take(size_bytes)
        with torch.inference_mode(False):
            memory = self.arena.lend(frame)[:size_bytes]
        self.arena.give(frame)
        return memory

    def trim(self) -> bool:
        """Give idle frames back; False when there were none."""
        self.arena.collect()
        before_bytes = self.held_bytes
        self.arena.trim()
        self.account.change(self.held_bytes - before_bytes)
        return self.held_bytes < before_bytes


@dataclass(slots=True, eq=False)
class Crossing:
    """A block's copy: a frame, and the transfer that fills it."""

    table: DeviceTable
    block: Block
    frame: Frame
    mark: Mark
    ticket: Ticket
    arrived: bool = False  # whatever computes from now on waits for it

    def read(self) -> None:
        """See `kvroom.Copy`. What went wrong is raised where the copy is wanted."""
        with contextlib.suppress(Exception):
            self.table.lane.wait(self.ticket)

    def discard(self) -> None:
        """See `kvroom.Copy`."""
        self.table.discard(self)


@dataclass(slots=True)
class Crossed:
    """What happened: blocks that crossed before their layer's turn, and in it; bytes of both."""

    ahead_copies: int = 0
    demand_copies: int = 0
    copied_bytes: int = 0


class DeviceTable:
    """Puts histories together in device memory; see `history.Table`."""

    def __init__(self, store: KVStore, room: DeviceRoom, copier: Copier, lane: Lane) -> None:
        self.room = room
        self.lane = lane
        self.counters = Crossed()
        self._store = store
        self._copier = copier
        self._here: dict[Crossing, None] = {}  # in the order of issue
        self._wanted: deque[Block] = deque()  # to be copied, in this order
        self._own: set[Block] = set()  # of the history that is put together
        self._spares_others = False  # room is wanted that is worth no other copy

    def enter(self, history: Lined) -> None:
        """Its blocks will be fetched, then those of the history that follows."""
        if history.tail is not None and history.tail.copy is not None:
            history.tail.copy.discard()  # left over by an error; it may have been written to
        self._store.enter(history)
        coming = self._store.order.coming
        own = [*history.blocks, *([history.tail] if history.tail is not None else [])]
        ahead = [] if coming is None or coming is history else coming.blocks
        self._own = set(own)
        for crossing in [c for c in self._here if c.block not in self._own.union(ahead)]:
            self.discard(crossing)
        self._wanted = deque(b for b in (*own, *ahead) if b.copy is None)
        self._pump()

    def lend(self, size_bytes: int) -> Tensor:
        return self.room.lend(size_bytes)

    def fetch(self, block: Block) -> Tensor:
        if block.copy is None:
            self._store.fetch(block)
            self._start(block, self.room.take(block.size_bytes))
        self._pump()
        crossing = block.copy
        assert isinstance(crossing, Crossing)
        self.lane.wait(crossing.ticket)
        self._copier.arrive(crossing.mark)
        crossing.arrived = True
        with torch.inference_mode(False):
            return self.room.arena.lend(crossing.frame)[: block.size_bytes]

    def release(self, block: Block, *, keep: bool) -> None:
        if block.copy is not None:
            block.copy.discard()
        self._store.release(block, keep=keep)
        self._pump()

    def discard(self, crossing: Crossing) -> None:
        """Its frame is free when the copy, and what computes with it, are over."""
        crossing.block.copy = None
        del self._here[crossing]
        try:
            if not crossing.arrived:
                self.lane.wait(crossing.ticket)
                self._copier.drain(crossing.mark)
        finally:
            self.room.arena.give(crossing.frame)

    def relieve(self, desperate: bool) -> bool:
        """Give memory back to the engine; ``desperate``: copies that were made ahead, too."""
        if not desperate or self._spares_others:
            return False  # what is idle now is wanted by the next layer
        for crossing in list(self._here):
            self.discard(crossing)
        return self.room.trim()

    def close(self) -> None:
        """Give everything back."""
        self._wanted.clear()
        self._own.clear()
        self.relieve(True)

    def _pump(self) -> None:
        """Begin copies of what the host has in memory, in the order in which it is wanted."""
        while self._wanted:
            block = self._wanted[0]
            if block.copy is None:
                if block.is_away or (block.loading is not None and not block.loading.done):
                    return
                try:
                    self._store.fetch(block)
                except SpillError:  # it will be read again on demand, and say so then
                    return
                frame = self._take_ahead(block)
                if frame is None:
                    return
                self._start(block, frame)
            self._wanted.popleft()

    def _take_ahead(self, block: Block) -> Frame | None:
        self._spares_others = True
        try:
            others_bytes = sum(c.frame.size_bytes for c in self._here)
            return self.room.take_ahead(block.size_bytes, others_bytes)
        finally:
            self._spares_others = False

    def _start(self, block: Block, frame: Frame) -> None:
        memory, arena = block.memory, self.room.arena
        assert memory is not None
        crossing = Crossing(
            self, block, frame, Mark(arena.memory.vacant(frame.address)), Ticket(TICKET_ID)
        )
        with torch.inference_mode(False):  # the worker that writes to it is in no such mode
            target = arena.memory.over(frame.address, frame.size_bytes, None)[: block.size_bytes]
        block.copy = crossing
        self._here[crossing] = None
        work = partial(_upload, self._copier, memory, target, crossing.mark)
        self.lane.submit(crossing.ticket, work, block.size_bytes)
        own = block in self._own
        self.counters.demand_copies += own
        self.counters.ahead_copies += not own
        self.counters.copied_bytes += block.size_bytes


def _upload(copier: Copier, source: Tensor, target: Tensor, mark: Mark) -> int:
    copier.upload(source, target, mark)
    return 0
