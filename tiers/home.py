"""Homes: where chunks live. Addresses are fixed for the run; the backing of each changes.

All page moves are made by the thread that owns the engine, between operations; lane workers only
read into frames and write from homes. So a home is always readable and right: see vm.py's note.

[Note: writes we did not make]
The user may write to any home at any time. Resident: the checksum taken when the chunk was last
equal to the file is compared before it is dropped, and a difference means "write it back".
Evicted: the write goes through the mapping to the file itself, and leaves two signs: the file's
modification time moves, and the written pages are in the page cache. When the time moves staged
copies are read again; cached pages are always taken over staged ones. A checksum that differs then
is believed if there is a sign and a second reading brings the same, else it is corruption, and
raises. Undecidable, beside a sign: the same wrong bytes read twice, or wrong in the page cache.
(The time speaks for the whole file, since written pages may have left the cache.)
"""

from __future__ import annotations

import contextlib
import weakref
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from offload.tiers import vm
from offload.tiers.checksum import checksum_of
from offload.tiers.disk import Disk
from offload.tiers.frames import Frame, FramePool
from offload.tiers.lane import Lane, Ticket
from offload.tiers.layout import Layout


class Backing(Enum):
    """What stands at a chunk's home address, and where the truth is."""

    VOID = "void"  # nothing worth keeping
    FILE = "file"  # the spill file's mapping
    RAM = "ram"  # a frame's pages


class CorruptChunk(OSError):  # noqa: N818 (as DiskFull: a condition of the disk)
    """What came back from the spill file is not what was written."""


@dataclass(slots=True, eq=False)
class Chunk:
    """The unit of placement and transfer."""

    id: int
    address: int
    size_bytes: int
    offset: int  # in the spill file; -1 without one
    label: str
    backing: Backing = Backing.VOID
    dirty: bool = False
    sparse: bool = False  # read row by row where it lies, hardly ever as a whole
    frame: Frame | None = None  # whose pages are at home, or are being filled
    loading: Ticket | None = None
    saving: Ticket | None = None
    checksum: int = 0
    checksum_epoch: int = 0  # the space's epoch when checksum was last known to be the file's


class Mapping:
    """Keeps an address range mapped while any tensor over it lives."""

    def __init__(self, address: int, size_bytes: int) -> None:
        weakref.finalize(self, vm.release, address, size_bytes)


@dataclass(frozen=True, slots=True)
class Region:
    """The chunks of one kind and dtype over one layout; ``chunk_ids[i]`` holds run chunk i."""

    address: int
    layout: Layout
    itemsize: int
    chunk_ids: range
    mapping: Mapping

    def address_of(self, tensor: int) -> int:
        """Where a tensor of the layout starts."""
        return self.address + self.layout.starts[tensor] * self.itemsize

    def chunks_of(self, tensor: int) -> tuple[int, ...]:
        """Global ids of the chunks that hold a tensor."""
        first = self.chunk_ids.start
        return tuple(first + c for c in self.layout.chunks_of(tensor))


class HomeSpace:
    """All chunks of a run, their backing, and the transfers between."""

    def __init__(self, disk: Disk | None, pool: FramePool, read: Lane, write: Lane) -> None:
        self.chunks: list[Chunk] = []
        self.pool = pool
        self.disk = disk
        self.lanes = {"read": read, "write": write}
        self.fixed_bytes = 0  # regions that have no disk below them
        self._epoch = 0
        self._loads: dict[int, Chunk] = {}
        self._bases: list[int] = []
        self._regions: list[Region] = []

    # -- building ---------------------------------------------------------------------------

    def add_region(self, label: str, layout: Layout, itemsize: int) -> Region:
        """Give a layout addresses and room in the spill file. Raises DiskFull."""
        size = layout.total_elements * itemsize
        address = vm.reserve(size)
        offset = -1
        if self.disk is not None:
            offset = self.disk.grow(size)
            vm.map_file(address, size, self.disk.fd, offset)
        else:
            vm.want_huge(address, size)
            self.fixed_bytes += size
        first = len(self.chunks)
        for c in range(layout.chunks):
            start, stop = (e * itemsize for e in layout.chunk_range(c))
            where = offset + start if offset >= 0 else -1
            chunk = Chunk(first + c, address + start, stop - start, where, f"{label} chunk {c}")
            if self.disk is None:  # its one home is RAM, for good
                chunk.backing, chunk.dirty = Backing.RAM, True
            self.chunks.append(chunk)
        region = Region(
            address, layout, itemsize, range(first, len(self.chunks)), Mapping(address, size)
        )
        at = bisect_right(self._bases, address)
        self._bases.insert(at, address)
        self._regions.insert(at, region)
        return region

    def chunks_at(self, address: int, size_bytes: int) -> tuple[int, ...]:
        """Ids of the chunks under an address range; empty when it is not ours."""
        at = bisect_right(self._bases, address) - 1
        if at < 0:
            return ()
        region = self._regions[at]
        offset = address - region.address
        if offset >= region.layout.total_elements * region.itemsize:
            return ()
        span = region.layout.chunk_elements * region.itemsize
        last = (offset + max(size_bytes, 1) - 1) // span
        return tuple(region.chunk_ids[offset // span : last + 1])

    # -- disk -> home -----------------------------------------------------------------------

    def start_load(self, chunk: Chunk) -> None:
        """Begin reading an evicted chunk into a frame. Its home stays the file meanwhile."""
        assert self.disk is not None
        assert chunk.backing is Backing.FILE
        assert chunk.loading is None
        chunk.frame = self.pool.take(chunk.size_bytes)
        self._saw(chunk, chunk.size_bytes)
        chunk.loading = Ticket(chunk.id)
        self._loads[chunk.id] = chunk
        self.lanes["read"].submit(chunk.loading, self._reading(chunk), chunk.size_bytes)

    def install(self, chunk: Chunk, *, user_code: bool = True) -> None:
        """Put a loaded chunk's pages at its home, waiting for the read if need be.

        ``user_code``: whether any ran since the load began, that may have written to the home.
        """
        ticket, frame = chunk.loading, chunk.frame
        assert ticket is not None
        assert frame is not None
        try:
            self.lanes["read"].wait(ticket)
            if user_code or ticket.result != chunk.checksum:
                self._look_for_foreign_writes()
                if chunk.loading is not ticket:  # a foreign write was seen: it was read again
                    ticket = chunk.loading
                    assert ticket is not None
                    self.lanes["read"].wait(ticket)
                self._heed_mapping(chunk, ticket)
        except OSError:
            self._end_load(chunk)  # the next need tries again
            raise
        vm.move_pages(frame.address, chunk.address, chunk.size_bytes)
        chunk.backing, chunk.dirty, chunk.loading = Backing.RAM, False, None
        del self._loads[chunk.id]

    def make_fresh(self, chunk: Chunk) -> None:
        """Back a chunk with a frame whose contents do not matter; it becomes dirty."""
        assert chunk.backing is not Backing.RAM
        assert chunk.loading is None
        chunk.frame = self.pool.take(chunk.size_bytes)
        self._saw(chunk, chunk.size_bytes)
        vm.move_pages(chunk.frame.address, chunk.address, chunk.size_bytes)
        chunk.backing, chunk.dirty = Backing.RAM, True

    def trust_file(self, chunk: Chunk) -> None:
        """A void chunk is about to be written through its mapping: the file becomes the truth."""
        if chunk.backing is Backing.VOID:
            chunk.backing, chunk.checksum_epoch = Backing.FILE, self._epoch - 1

    # -- home -> disk -----------------------------------------------------------------------

    def start_save(self, chunk: Chunk) -> None:
        """Begin writing a resident chunk to the file; nobody may change it until finished."""
        assert chunk.backing is Backing.RAM
        assert chunk.saving is None
        if self.disk is None:
            raise OSError(f"{chunk.label} cannot be evicted: this run has no disk tier")
        chunk.saving = Ticket(chunk.id)
        self.lanes["write"].submit(chunk.saving, self._writing(chunk), chunk.size_bytes)

    def finish_save(self, chunk: Chunk) -> None:
        """Wait for a write; the chunk is then clean."""
        ticket, chunk.saving = chunk.saving, None
        assert ticket is not None
        self.lanes["write"].wait(ticket)  # where it failed the chunk stays resident and dirty
        chunk.checksum, chunk.checksum_epoch, chunk.dirty = ticket.result, self._epoch, False

    def unchanged(self, chunk: Chunk) -> bool:
        """Whether a clean resident chunk still equals the file: nobody wrote to it unseen."""
        return checksum_of(chunk.address, chunk.size_bytes) == chunk.checksum

    def drop(self, chunk: Chunk, *, dead: bool = False) -> None:
        """Take a resident chunk's pages away. It must be clean, or dead."""
        assert chunk.backing is Backing.RAM
        assert chunk.frame is not None
        assert chunk.saving is None
        assert dead or not chunk.dirty
        assert self.disk is not None
        vm.move_pages(chunk.address, chunk.frame.address, chunk.size_bytes)
        vm.map_file(chunk.address, chunk.size_bytes, self.disk.fd, chunk.offset)
        if chunk.sparse:
            vm.expect_sparse_reads(chunk.address, chunk.size_bytes)
        self.pool.give(chunk.frame)
        self._saw(chunk, -chunk.size_bytes)
        chunk.backing = Backing.VOID if dead else Backing.FILE
        chunk.frame, chunk.dirty = None, False

    def loads(self) -> list[Chunk]:
        """Chunks whose read is in flight or done but not installed, in the order of issue."""
        return list(self._loads.values())

    def held(self) -> list[int]:
        """The chunk of each frame that is in use."""
        return [c.id for c in self.chunks if c.frame is not None]

    def abandon_load(self, chunk: Chunk) -> None:
        """Give up a prefetched copy that is not wanted after all."""
        assert chunk.loading is not None
        with contextlib.suppress(OSError):  # whatever came, it is not wanted
            self.lanes["read"].wait(chunk.loading)
        self._end_load(chunk)

    def _end_load(self, chunk: Chunk) -> None:
        assert chunk.frame is not None
        self.pool.give(chunk.frame)
        self._saw(chunk, -chunk.size_bytes)
        chunk.loading = chunk.frame = None
        del self._loads[chunk.id]

    def close(self) -> None:
        """Stop the lanes and close the file. Homes in the file stay valid while mapped."""
        try:
            for lane in self.lanes.values():
                lane.close()
        finally:
            if self.disk is not None:
                self.disk.close()

    # -- inside -----------------------------------------------------------------------------

    def _saw(self, chunk: Chunk, size_bytes: int) -> None:
        if self.pool.seen is not None:
            self.pool.seen(chunk.id, size_bytes)

    def _reading(self, chunk: Chunk) -> Callable[[], int]:
        disk, frame = self.disk, chunk.frame
        assert disk is not None
        assert frame is not None
        return lambda: disk.read(frame.address, chunk.size_bytes, chunk.offset)

    def _writing(self, chunk: Chunk) -> Callable[[], int]:
        disk = self.disk
        assert disk is not None
        return lambda: disk.write(chunk.address, chunk.size_bytes, chunk.offset)

    @property
    def epoch(self) -> int:
        """How often foreign writes were seen."""
        return self._epoch

    def look(self) -> int:
        """The epoch, after looking for foreign writes once more."""
        self._look_for_foreign_writes()
        return self._epoch

    def _look_for_foreign_writes(self) -> None:
        """Notice writes made through mappings; read staged copies again if there were any."""
        if self.disk is None or not self.disk.foreign_write():
            return
        self._epoch += 1
        for chunk in self._loads.values():
            assert chunk.loading is not None
            self.lanes["read"].wait(chunk.loading)
            self._submit_again(chunk)

    def _heed_mapping(self, chunk: Chunk, ticket: Ticket) -> None:
        """Bring a staged copy up to what its home shows; the checksum says whether to believe it.

        The file's time cannot tell while writes of ours are in flight. Those are direct and leave
        nothing in the page cache: what is there, somebody touched.
        """
        assert self.disk is not None
        cached = self._with_cached_pages(chunk)
        checksum = ticket.result if cached is None else cached
        if chunk.checksum not in (ticket.result, checksum):
            sign = self._epoch > chunk.checksum_epoch
            if cached is not None:  # other I/O may leave its own pages there, which is then no sign
                sign |= self.disk.engine == "O_DIRECT" or checksum != ticket.result
            again = self._read_again(chunk) if sign else None
            if again not in (checksum, chunk.checksum):
                raise self._corrupt(chunk, checksum)
            checksum = again
        chunk.checksum, chunk.checksum_epoch = checksum, self._epoch

    def _read_again(self, chunk: Chunk) -> int:
        ticket = self._submit_again(chunk)
        self.lanes["read"].wait(ticket)
        cached = self._with_cached_pages(chunk)
        return ticket.result if cached is None else cached

    def _with_cached_pages(self, chunk: Chunk) -> int | None:
        """Put the home's cached pages over the staged ones; the checksum then, None without any."""
        assert chunk.frame is not None
        if not vm.take_cached(chunk.address, chunk.frame.address, chunk.size_bytes):
            return None
        return checksum_of(chunk.frame.address, chunk.size_bytes)

    def _submit_again(self, chunk: Chunk) -> Ticket:
        ticket = chunk.loading = Ticket(chunk.id)
        self.lanes["read"].submit(ticket, self._reading(chunk), chunk.size_bytes)
        return ticket

    @staticmethod
    def _corrupt(chunk: Chunk, checksum: int) -> CorruptChunk:
        return CorruptChunk(
            f"what came back from offset {chunk.offset} ({chunk.size_bytes} bytes) is different "
            f"from what was written (checksum {checksum:016x}, expected {chunk.checksum:016x}); "
            "the disk or its file system is losing data: use another disk=... folder and "
            "resume from the last checkpoint"
        )
