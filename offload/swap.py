"""Saved activations on disk: written after their unit's forward, read back before its backward.

They have a spill file of their own, so that the weights' file changes only when weights do. A
worker copies a storage through a small aligned buffer to the file; the tensors are let go of when
that write is complete, so nothing is held twice. Reading goes straight into huge pages, over which
the tensor is built again: its shape, strides and 64-byte alignment are the same, hence its bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from offload.engine import Engine
from offload.errors import BudgetError, OffloadError, SpillError
from offload.ledger import Other
from offload.saved import Saved
from offload.tiers import vm
from offload.tiers.disk import Disk, DiskFull, SpillFile
from offload.tiers.lane import Ticket
from offload.tiers.spec import KIB, MIB, round_up

LEAST_BYTES = 64 * KIB  # smaller storages are kept: a transfer costs more than their room
STAGES = 2  # as many as a lane has workers
TICKET_ID = -1  # in a lane's records, where chunks have their numbers


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


class SwapArea:
    """Slots in the file, transfers under way, and the room that they take."""

    def __init__(self, engine: Engine, storage: SwapFile) -> None:
        self.engine = engine
        self.moved_bytes = 0
        self.stage_bytes = max(min(4 * MIB, engine.ledger.budget_bytes // 64), LEAST_BYTES)
        self.stage_bytes = round_up(self.stage_bytes, vm.PAGE_BYTES)
        self._storage = storage
        self._disk: Disk | None = None
        self._stages: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._slots: defaultdict[int, list[int]] = defaultdict(list)
        self._writing: deque[Parked] = deque()
        self.ahead: list[weakref.ref[Parked]] = []  # read, or being read, and not used yet
        self.freed: deque[int] = deque()  # bytes of frames whose tensors are gone

    @property
    def disk(self) -> Disk:
        """The spill file. Raises OffloadError once the run is closed."""
        if self._disk is None:
            raise OffloadError(
                "a swapped activation is wanted after the run was closed: call backward() before "
                "offload.runtime(model).close() or unwrap()"
            )
        return self._disk

    def require_open(self) -> None:
        """Raises OffloadError once the run is closed."""
        assert self.disk is not None

    @property
    def used_bytes(self) -> int:
        """Of the disk."""
        return self._disk.used_bytes if self._disk is not None else 0

    def park(self, group: list[Saved]) -> Parked:
        """Begin to write the storage that these tensors share; they let go of it afterwards."""
        self._open()
        parked = Parked(self, group)
        self._writing.append(parked)
        return parked

    def poll(self) -> None:
        """Finish what is done: credit freed frames, let go of tensors that are written."""
        self.ahead = [ref for ref in self.ahead if (p := ref()) is not None and p.is_ahead]
        while self.freed:
            self.engine.ledger.give_other(self.freed.popleft())
        while self._writing and self._writing[0].written.done:
            self._writing.popleft().finish_write()

    def relieve(self, desperate: bool = False) -> bool:
        """Wait for one write, for the room it gives; False when there is none under way.

        ``desperate``: where there is none, give up something that was read ahead.
        """
        had_freed = bool(self.freed)
        self.poll()
        if had_freed:
            return True
        if self._writing:
            self._writing.popleft().finish_write()
            return True
        while desperate and self.ahead:
            parked = self.ahead.pop()()
            if parked is not None and parked.give_up():
                return True
        return False

    def take_slot(self, size_bytes: int) -> int:
        """An offset in the file for so many bytes, whole pages. Raises SpillError."""
        if self._slots[size_bytes]:
            return self._slots[size_bytes].pop()
        try:
            return self.disk.grow(size_bytes)
        except DiskFull as error:
            raise SpillError(f"activations: {error.strerror}") from error

    def give_slot(self, offset: int, size_bytes: int) -> None:
        self._slots[size_bytes].append(offset)

    def writing(self, address: int, size_bytes: int, offset: int, sums: list[int]) -> None:
        """A worker's work: memory to file by way of an aligned buffer, noting the checksums."""
        stage, disk = self._stages.get(), self.disk
        try:
            for at in range(0, size_bytes, self.stage_bytes):
                count = min(self.stage_bytes, size_bytes - at)
                ctypes.memmove(stage, address + at, count)
                sums.append(disk.write(stage, round_up(count, vm.PAGE_BYTES), offset + at))
        finally:
            self._stages.put(stage)

    def reading(self, address: int, size_bytes: int, offset: int, sums: list[int]) -> None:
        """A worker's work: file to memory. Raises OSError when it is not what was written."""
        for at, expected in zip(range(0, size_bytes, self.stage_bytes), sums, strict=True):
            count = min(self.stage_bytes, size_bytes - at)
            if (
                self.disk.read(address + at, round_up(count, vm.PAGE_BYTES), offset + at)
                != expected
            ):
                raise OSError(f"what came back from offset {offset + at} is not what was written")

    def close(self) -> None:
        """Await transfers and close the file. Raises nothing: what fails here is not wanted."""
        while self._writing:
            self._writing.popleft().abandon()
        self.poll()
        if self._disk is None:
            return
        for _ in range(STAGES):
            vm.release(self._stages.get(), self.stage_bytes)
        self.engine.ledger.give_other(STAGES * self.stage_bytes, Other.STAGING)
        self._disk.close()
        self._disk = None

    def _open(self) -> None:
        if self._disk is not None:
            return
        self.engine.take_other(
            STAGES * self.stage_bytes, "staging for swapped activations", Other.STAGING
        )
        self._disk = self._storage.open()
        for _ in range(STAGES):
            stage = vm.reserve(self.stage_bytes)
            vm.want_huge(stage, self.stage_bytes)
            self._stages.put(stage)


class Parked:
    """One storage on its way to the file, in it, or on its way back."""

    def __init__(self, area: SwapArea, group: list[Saved]) -> None:
        tensor = group[0].tensor
        assert tensor is not None
        storage = tensor.untyped_storage()
        self.size_bytes = storage.nbytes()
        self.written = Ticket(TICKET_ID)
        self._area = area
        self._held: Tensor | None = tensor  # until it is written
        self._group = [weakref.ref(s) for s in group]
        self._sums: list[int] = []
        self._offset = area.take_slot(self._room_bytes)
        self._loading: tuple[Ticket, Tensor] | None = None
        self._used = False
        address, size, offset, sums = storage.data_ptr(), self.size_bytes, self._offset, self._sums
        self._submit("write", self.written, lambda: area.writing(address, size, offset, sums))

    @property
    def _room_bytes(self) -> int:
        return round_up(self.size_bytes, vm.PAGE_BYTES)

    @property
    def is_away(self) -> bool:
        """Whether its bytes are in the file alone."""
        return self._held is None and self._loading is None

    @property
    def is_ahead(self) -> bool:
        """Whether it was read, or is being read, and not used yet."""
        return self._loading is not None and not self._used

    def __del__(self) -> None:
        # A write under way keeps this alive (the area's queue); what a read under way may find,
        # once the slot has another owner, nobody wants.
        if hasattr(self, "_offset"):
            self._area.give_slot(self._offset, self._room_bytes)

    def finish_write(self) -> None:
        """The tensors go. Raises SpillError where the write failed (they then stay)."""
        self._wait("write", self.written, "written to")
        self._held = None
        for ref in self._group:
            saved = ref()
            if saved is not None:
                saved.leave(self)
        self._group.clear()

    def abandon(self) -> None:
        """The run ends: the tensors stay where they are."""
        with contextlib.suppress(OSError):
            self._area.engine.space.lanes["write"].wait(self.written)
        self._held = None

    def read_ahead(self) -> bool:
        """Begin to read it back, if there is room or room can be made."""
        if not self.is_away:
            return True
        try:
            self._area.engine.make_room_for(self._room_bytes, "a swapped activation")
        except BudgetError:
            return False
        self._load()
        self._area.ahead.append(weakref.ref(self))
        return True

    def give_up(self) -> bool:
        """Let go of what was read ahead; False when it is in use, or gone already."""
        if not self.is_ahead:
            return False
        self.forget()
        return True

    def fetch(self) -> Tensor:
        """Its bytes. Raises SpillError, BudgetError."""
        if self._loading is None:
            self._load()
        assert self._loading is not None
        ticket, memory = self._loading
        self._used = True
        self._wait("read", ticket, "read from")
        return memory

    def forget(self) -> None:
        """Let go of what was read: the file has it still."""
        if self._loading is not None:
            self._wait("read", self._loading[0], "read from")
            self._loading, self._used = None, False
            self._area.poll()

    def _load(self) -> None:
        area, size, offset, sums = self._area, self.size_bytes, self._offset, self._sums
        area.require_open()
        area.poll()
        area.engine.take_other(self._room_bytes, "a swapped activation")
        address = vm.reserve(self._room_bytes)
        vm.want_huge(address, self._room_bytes)
        buffer = vm.buffer_at(address, size)
        gone = weakref.finalize(buffer, _release, address, self._room_bytes, area.freed)
        gone.atexit = False
        ticket = Ticket(TICKET_ID)
        memory = torch.frombuffer(buffer, dtype=torch.uint8)
        self._loading = ticket, memory
        # The work holds the memory: should nobody want it any more, it is still there to read to.
        self._submit("read", ticket, lambda: area.reading(memory.data_ptr(), size, offset, sums))

    def _submit(self, lane: str, ticket: Ticket, work: Callable[[], None]) -> None:
        def transfer() -> int:
            work()
            return 0

        self._area.moved_bytes += self.size_bytes
        self._area.engine.space.lanes[lane].submit(ticket, transfer, self.size_bytes)

    def _wait(self, lane: str, ticket: Ticket, how: str) -> None:
        engine, start_s = self._area.engine, time.perf_counter()
        try:
            engine.space.lanes[lane].wait(ticket)
            engine.waited(lane, TICKET_ID, start_s)
        except OSError as error:
            raise SpillError(
                f"a saved activation could not be {how} the spill file: {error}"
            ) from error


def _release(address: int, size_bytes: int, freed: deque[int]) -> None:
    """The last tensor over a frame is gone, on whatever thread: the account follows later."""
    vm.release(address, size_bytes)
    freed.append(size_bytes)
