"""The disk below: storages of activations in a spill file of their own.

It is their own so that the weights' file changes only when weights do. A worker copies a storage
through a small aligned buffer to the file. Reading goes straight into huge pages where the tensors
are the host's, and through a buffer where they are a device's.
"""

from __future__ import annotations

import ctypes
import queue
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from offload.engine import Engine
from offload.errors import OffloadError, SpillError
from offload.ledger import Other
from offload.swap import LEAST_BYTES, TICKET_ID, Spot
from offload.tiers import vm
from offload.tiers.disk import Disk, DiskFull, SpillFile
from offload.tiers.lane import Lane, Ticket
from offload.tiers.spec import MIB, round_up

STAGES = 2  # as many as a lane has workers


class SwapFile:
    """Where the spill file of activations goes, made when the first is written."""

    def __init__(
        self, folder: Path, limit_bytes: int | None, announce: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._announce = announce

    def open(self) -> Disk:
        """The file, in the user's folder, within what ``disk_memory`` leaves."""
        return SpillFile(self._folder, self._limit_bytes, self._announce)


class Slot:
    """A place in the file, free for others when nobody has this, and checksums of what is there."""

    def __init__(self, store: SwapStore, size_bytes: int) -> None:
        self.size_bytes = round_up(size_bytes, vm.PAGE_BYTES)
        self.sums: list[int] = []
        self.store = store
        self.offset = store.take(self.size_bytes)

    def __del__(self) -> None:
        # What a read under way may find, once the slot has another owner, nobody wants.
        if hasattr(self, "offset"):
            self.store.give(self.offset, self.size_bytes)


class SwapStore:
    """The file and the buffers before it, which ``payer``, the host's engine, debits."""

    def __init__(self, payer: Engine, storage: SwapFile) -> None:
        self.stage_bytes = max(min(4 * MIB, payer.ledger.budget_bytes // 64), LEAST_BYTES)
        self.stage_bytes = round_up(self.stage_bytes, vm.PAGE_BYTES)
        self._payer = payer
        self._storage = storage
        self._disk: Disk | None = None
        self._stages: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._slots: defaultdict[int, list[int]] = defaultdict(list)

    @property
    def disk(self) -> Disk:
        """The spill file. Raises OffloadError once the run is closed."""
        if self._disk is None:
            raise OffloadError(CLOSED)
        return self._disk

    @property
    def is_open(self) -> bool:
        """Whether there is a file, and buffers."""
        return self._disk is not None

    @property
    def used_bytes(self) -> int:
        """Of the disk."""
        return self._disk.used_bytes if self._disk is not None else 0

    @property
    def staging_bytes(self) -> int:
        """Of the host's memory, once it is open."""
        return STAGES * self.stage_bytes

    def open(self) -> None:
        """Make the file and the buffers, unless they are there. Raises BudgetError."""
        if self._disk is not None:
            return
        self._payer.take_other(self.staging_bytes, "staging for swapped activations", Other.STAGING)
        self._disk = self._storage.open()
        for _ in range(STAGES):
            stage = vm.reserve(self.stage_bytes)
            vm.want_huge(stage, self.stage_bytes)
            self._stages.put(stage)

    def take(self, size_bytes: int) -> int:
        """An offset in the file for so many bytes, whole pages. Raises SpillError."""
        if self._slots[size_bytes]:
            return self._slots[size_bytes].pop()
        try:
            return self.disk.grow(size_bytes)
        except DiskFull as error:
            raise SpillError(f"activations: {error.strerror}") from error

    def give(self, offset: int, size_bytes: int) -> None:
        """It is free."""
        self._slots[size_bytes].append(offset)

    def write(self, slot: Slot, size_bytes: int, fill: Callable[[int, int, int], None]) -> None:
        """A worker's work. ``fill(stage, at, count)``: put these bytes at this address."""
        stage, disk = self._stages.get(), self.disk
        try:
            for at in range(0, size_bytes, self.stage_bytes):
                count = min(self.stage_bytes, size_bytes - at)
                fill(stage, at, count)
                padded = round_up(count, vm.PAGE_BYTES)
                slot.sums.append(disk.write(stage, padded, slot.offset + at))
        finally:
            self._stages.put(stage)

    def read(self, slot: Slot, size_bytes: int, take: Callable[[int, int, int], None]) -> None:
        """The way back: ``take(stage, at, count)``. Raises OSError for other bytes."""
        stage = self._stages.get()
        try:
            for at, expected in zip(range(0, size_bytes, self.stage_bytes), slot.sums, strict=True):
                count = min(self.stage_bytes, size_bytes - at)
                self._read_part(stage, count, slot.offset + at, expected)
                take(stage, at, count)
        finally:
            self._stages.put(stage)

    def read_straight(self, slot: Slot, size_bytes: int, address: int) -> None:
        """The same without a buffer, into aligned memory of whole pages."""
        for at, expected in zip(range(0, size_bytes, self.stage_bytes), slot.sums, strict=True):
            count = min(self.stage_bytes, size_bytes - at)
            self._read_part(address + at, count, slot.offset + at, expected)

    def close(self) -> None:
        """Free the buffers and the file; no transfer is under way."""
        if self._disk is None:
            return
        for _ in range(STAGES):
            vm.release(self._stages.get(), self.stage_bytes)
        self._payer.ledger.give_other(self.staging_bytes, Other.STAGING)
        self._disk.close()
        self._disk = None

    def _read_part(self, address: int, count: int, offset: int, expected: int) -> None:
        if self.disk.read(address, round_up(count, vm.PAGE_BYTES), offset) != expected:
            raise OSError(f"what came back from offset {offset} is not what was written")


CLOSED = (
    "a swapped activation is wanted after the run was closed: call backward() before "
    "offload.runtime(model).close() or unwrap()"
)


class DiskRoute:
    """From tensors of the host to the file and back."""

    place = torch.device("cpu")

    def __init__(self, store: SwapStore, lanes: dict[str, Lane]) -> None:
        self.out, self.back = lanes["write"], lanes["read"]
        self.store = store
        self._freed: deque[int] = deque()  # bytes of memory whose tensors are gone

    @property
    def disk_bytes(self) -> int:
        return self.store.used_bytes

    def require_open(self) -> None:
        assert self.store.disk is not None

    def held_bytes(self, size_bytes: int) -> int:
        return round_up(size_bytes, vm.PAGE_BYTES)

    def find(self, size_bytes: int) -> Slot:
        self.store.open()
        return Slot(self.store, size_bytes)

    def send(self, source: Tensor, spot: Spot, ticket: Ticket) -> None:
        assert isinstance(spot, Slot)
        address, size, store = source.data_ptr(), source.nbytes, self.store

        def write() -> int:
            store.write(spot, size, lambda to, at, n: _copy(to, address + at, n))
            return 0

        self.out.submit(ticket, write, size)

    def fetch(self, spot: Spot, size_bytes: int) -> Pages:
        assert isinstance(spot, Slot)
        pages, store = Pages(size_bytes, self._freed), self.store

        def read() -> int:
            # Holds the pages: should nobody want them any more, they are still there to read to.
            store.read_straight(spot, size_bytes, pages.memory().data_ptr())
            return 0

        self.back.submit(pages.ticket, read, size_bytes)
        return pages

    def collect(self) -> int:
        found = 0
        while self._freed:
            found += self._freed.popleft()
        return found

    def close(self) -> None:
        self.store.close()


class Pages:
    """Host memory of whole pages, given back when the last tensor over it is gone."""

    def __init__(self, size_bytes: int, freed: deque[int]) -> None:
        self.ticket = Ticket(TICKET_ID)
        room_bytes = round_up(size_bytes, vm.PAGE_BYTES)
        address = vm.reserve(room_bytes)
        vm.want_huge(address, room_bytes)
        buffer = vm.buffer_at(address, size_bytes)
        gone = weakref.finalize(buffer, _release, address, room_bytes, freed)
        gone.atexit = False
        self._memory = torch.frombuffer(buffer, dtype=torch.uint8)

    def memory(self) -> Tensor:
        return self._memory


def _copy(to: int, source: int, count: int) -> None:
    ctypes.memmove(to, source, count)


def _release(address: int, size_bytes: int, freed: deque[int]) -> None:
    """The last tensor over it is gone, on whatever thread: the account follows later."""
    vm.release(address, size_bytes)
    freed.append(size_bytes)
