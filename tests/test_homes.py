"""Homes: addresses stay, backings change, and nothing that a user wrote is lost on the way."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.frames import POISON_BYTE, FramePool
from offload.tiers.home import Backing, Chunk, CorruptChunk, HomeSpace
from offload.tiers.lane import Meter, Ticket
from offload.tiers.layout import lay_out
from offload.tiers.spec import KIB

CHUNK = 16 * KIB
ELEMENTS = CHUNK // 4


def all_are(tensor: Tensor, value: float) -> bool:
    return bool((tensor == value).all())


class HeldLane:
    """A lane that does nothing until it is told to, or somebody waits."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.held: list[tuple[Ticket, Callable[[], int]]] = []

    def submit(self, ticket: Ticket, work: Callable[[], int], size_bytes: int) -> None:
        self.held.append((ticket, work))

    def wait(self, ticket: Ticket) -> None:
        for held in [h for h in self.held if h[0] is ticket]:
            self.held.remove(held)
            ticket.run(held[1])
        ticket.wait()

    def run_all(self) -> None:
        """Do everything that is queued."""
        while self.held:
            self.wait(self.held[0][0])

    close = run_all


class SlowDisk(SpillFile):
    """A spill file with something that happens in the middle of the next write."""

    during_write: Callable[[], object] | None = None

    def push(self, address: int, size_bytes: int, offset: int) -> None:
        super().push(address, size_bytes, offset)
        happening, self.during_write = self.during_write, None
        if happening is not None:
            happening()


class Rig:
    """A home space of four chunks, each under a tensor of its own."""

    def __init__(self, disk: SpillFile) -> None:
        self.read, self.write = HeldLane(), HeldLane()
        self.pool = FramePool(poison=True)
        self.disk = disk
        self.space = HomeSpace(disk, self.pool, self.read, self.write)
        self.region = self.space.add_region("weights", lay_out([ELEMENTS] * 4, ELEMENTS), 4)
        self.tensors = [self._tensor(i) for i in range(4)]

    def _tensor(self, i: int) -> Tensor:
        buffer = vm.buffer_at(self.region.address_of(i), CHUNK)
        buffer.mapping = self.region.mapping  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.float32)

    def fill(self, i: int, value: float) -> Chunk:
        """A fresh chunk full of one value, resident and dirty."""
        chunk = self.space.chunks[i]
        self.space.make_fresh(chunk)
        self.tensors[i].fill_(value)
        return chunk

    def save(self, chunk: Chunk) -> None:
        self.space.start_save(chunk)
        self.space.finish_save(chunk)

    def evict(self, chunk: Chunk) -> None:
        self.save(chunk)
        self.space.drop(chunk)

    def load(self, chunk: Chunk) -> None:
        self.space.start_load(chunk)
        self.space.install(chunk)

    def evicted(self, i: int, value: float) -> Chunk:
        chunk = self.fill(i, value)
        self.evict(chunk)
        return chunk

    def during_write(self, happening: Callable[[], object]) -> None:
        """Do something in the middle of the next write."""
        assert isinstance(self.disk, SlowDisk)
        self.disk.during_write = happening


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    yield (rig := Rig(SlowDisk(tmp_path)))
    rig.space.close()


def test_address_stays_and_value_is_right_in_every_backing(rig: Rig) -> None:
    tensor, where = rig.tensors[1], rig.tensors[1].data_ptr()
    chunk = rig.fill(1, 3.0)
    rig.space.start_save(chunk)
    assert all_are(tensor, 3.0)  # while it is being written
    rig.space.finish_save(chunk)
    assert all_are(tensor, 3.0)
    rig.space.drop(chunk)
    assert chunk.backing is Backing.FILE
    assert all_are(tensor, 3.0)  # through the mapping
    rig.space.start_load(chunk)
    rig.read.run_all()
    assert all_are(tensor, 3.0)  # staged, not installed
    rig.space.install(chunk)
    assert all_are(tensor, 3.0)
    assert tensor.data_ptr() == where


def test_frames_rotate_and_are_poisoned(rig: Rig) -> None:
    chunks = [rig.fill(i, float(i)) for i in range(2)]
    frames = [chunk.frame for chunk in chunks]
    for chunk, frame in zip(chunks, frames, strict=True):
        rig.evict(chunk)
        assert frame is not None
        assert vm.buffer_at(frame.address, CHUNK).raw == bytes([POISON_BYTE]) * CHUNK
    rig.load(chunks[1])
    assert chunks[1].frame == frames[0]  # another one than it had
    rig.space.drop(chunks[1])
    rig.pool.trim()
    assert rig.pool.total_bytes == rig.pool.idle_bytes == 0


def test_write_to_resident_chunk_is_seen_at_eviction(rig: Rig) -> None:
    rig.load(chunk := rig.evicted(0, 1.0))
    assert rig.space.unchanged(chunk)
    rig.tensors[0].numpy()[7] = 9.0
    assert not rig.space.unchanged(chunk)


def test_write_to_evicted_chunk_is_kept(rig: Rig) -> None:
    chunk = rig.evicted(0, 1.0)
    rig.tensors[0].mul_(5.0)
    rig.load(chunk)
    assert all_are(rig.tensors[0], 5.0)


def test_two_writes_to_the_same_page_are_kept(rig: Rig) -> None:
    chunk, other = rig.evicted(0, 1.0), rig.evicted(1, 2.0)
    rig.tensors[0].mul_(5.0)
    rig.load(other)  # looks at the file's time: the page stays dirty and writable meanwhile
    rig.tensors[0].add_(1.0)
    rig.load(chunk)
    assert all_are(rig.tensors[0], 6.0)


@pytest.mark.parametrize("read_done", [True, False])
def test_write_beside_a_staged_copy_is_kept(rig: Rig, read_done: bool) -> None:
    chunk = rig.evicted(0, 1.0)
    rig.space.start_load(chunk)
    if read_done:
        rig.read.run_all()
    rig.tensors[0].fill_(8.0)
    rig.space.install(chunk)
    assert all_are(rig.tensors[0], 8.0)


def test_write_beside_a_staged_copy_and_a_later_own_write_is_kept(rig: Rig) -> None:
    chunk, other = rig.evicted(0, 1.0), rig.fill(1, 2.0)
    rig.space.start_load(chunk)
    rig.read.run_all()
    rig.during_write(lambda: rig.tensors[0].fill_(8.0))
    rig.save(other)
    rig.space.install(chunk)
    assert all_are(rig.tensors[0], 8.0)


def test_write_beside_a_staged_copy_read_during_an_own_write_is_kept(rig: Rig) -> None:
    chunk, other = rig.evicted(0, 1.0), rig.fill(1, 2.0)

    def stage_then_write() -> None:
        rig.space.start_load(chunk)
        rig.read.run_all()
        rig.tensors[0].fill_(8.0)

    rig.during_write(stage_then_write)
    rig.save(other)
    rig.space.install(chunk)
    assert all_are(rig.tensors[0], 8.0)


def test_write_during_an_own_write_is_not_taken_for_corruption(rig: Rig) -> None:
    chunk, other = rig.evicted(0, 1.0), rig.fill(1, 2.0)
    rig.during_write(lambda: rig.tensors[0].fill_(8.0))
    rig.save(other)
    rig.load(chunk)
    assert all_are(rig.tensors[0], 8.0)


def test_write_right_after_eviction_is_kept(rig: Rig) -> None:
    chunk = rig.evicted(0, 1.0)
    for n in range(40):  # a clock with coarse ticks would miss some
        rig.tensors[0].fill_(float(n))
        rig.load(chunk)
        assert all_are(rig.tensors[0], float(n))
        chunk.dirty = True
        rig.evict(chunk)


def test_void_chunk_written_through_its_mapping_is_believed(rig: Rig) -> None:
    rig.space.trust_file(rig.space.chunks[2])
    rig.tensors[2].fill_(4.0)
    rig.load(rig.space.chunks[2])
    assert all_are(rig.tensors[2], 4.0)


def test_abandoned_load_leaves_the_file_in_charge(rig: Rig) -> None:
    rig.space.start_load(chunk := rig.evicted(0, 1.0))
    rig.space.abandon_load(chunk)
    assert rig.space.loads() == []
    assert rig.pool.idle_bytes == rig.pool.total_bytes
    assert all_are(rig.tensors[0], 1.0)
    rig.load(chunk)
    assert all_are(rig.tensors[0], 1.0)


def test_chunks_at_finds_what_lies_under_a_range(rig: Rig) -> None:
    base = rig.region.address
    assert rig.space.chunks_at(base, 1) == (0,)
    assert rig.space.chunks_at(base + CHUNK - 4, 8) == (0, 1)
    assert rig.space.chunks_at(base + CHUNK, 3 * CHUNK) == (1, 2, 3)
    assert rig.space.chunks_at(base - 1, 4) == ()
    assert rig.space.chunks_at(base + 4 * CHUNK, 4) == ()
    assert rig.space.chunks_at(torch.ones(3).data_ptr(), 12) == ()


def test_homes_outlive_the_space_while_a_tensor_lives(tmp_path: Path) -> None:
    rig = Rig(SpillFile(tmp_path))
    rig.evicted(0, 6.0)
    tensor = rig.tensors[0]
    rig.space.close()
    del rig
    gc.collect()
    assert all_are(tensor.add_(1.0), 7.0)


def test_without_disk_nothing_can_be_evicted() -> None:
    space = HomeSpace(None, FramePool(), HeldLane(), HeldLane())
    space.add_region("weights", lay_out([ELEMENTS], ELEMENTS), 4)
    assert space.fixed_bytes == CHUNK
    with pytest.raises(OSError, match="weights chunk 0 cannot be evicted"):
        space.start_save(space.chunks[0])


# -- the disk ---------------------------------------------------------------------------------


class FaultyDisk(SpillFile):
    """A spill file that fails, or lies, when it is told to."""

    fault: str | None = None

    def pull(self, address: int, size_bytes: int, offset: int) -> None:
        if self.fault == "eio":
            raise OSError(errno.EIO, "Input/output error")
        super().pull(address, size_bytes, offset)
        if self.fault == "bit":
            vm.buffer_at(address + 4097, 1)[0] = bytes([vm.buffer_at(address + 4097, 1).raw[0] ^ 4])

    def push(self, address: int, size_bytes: int, offset: int) -> None:
        if self.fault == "enospc":
            raise OSError(errno.ENOSPC, "No space left on device")
        super().push(address, size_bytes, offset)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[tuple[Rig, FaultyDisk]]:
    disk = FaultyDisk(tmp_path)
    rig = Rig(disk)
    yield rig, disk
    disk.fault = None
    rig.space.close()


def test_flipped_bit_is_an_error(faulty: tuple[Rig, FaultyDisk]) -> None:
    rig, disk = faulty
    chunk = rig.evicted(2, 1.0)
    disk.fault = "bit"
    with pytest.raises(CorruptChunk, match=r"from offset 32768 .* is different from what was"):
        rig.load(chunk)
    disk.fault = None
    assert all_are(rig.tensors[2], 1.0)  # the home still shows the file


@pytest.mark.xfail(strict=True, reason="chunks with cached pages are believed unseen (B23)")
def test_flipped_bit_beside_cached_pages_is_never_believed(
    faulty: tuple[Rig, FaultyDisk],
) -> None:
    rig, disk = faulty
    chunk = rig.evicted(2, 1.0)
    assert all_are(rig.tensors[2], 1.0)  # a look through the mapping: pages are cached now
    disk.fault = "bit"
    with suppress(CorruptChunk):
        rig.load(chunk)
    assert all_are(rig.tensors[2], 1.0)


def test_read_error_surfaces_where_it_is_awaited(faulty: tuple[Rig, FaultyDisk]) -> None:
    rig, disk = faulty
    chunk = rig.evicted(1, 1.0)
    disk.fault = "eio"
    with pytest.raises(OSError, match="Input/output error"):
        rig.load(chunk)
    disk.fault = None
    rig.load(chunk)  # a second try is possible
    assert all_are(rig.tensors[1], 1.0)


def test_write_error_leaves_the_chunk_resident(faulty: tuple[Rig, FaultyDisk]) -> None:
    rig, disk = faulty
    chunk = rig.fill(1, 3.0)
    disk.fault = "enospc"
    with pytest.raises(OSError, match="No space left"):
        rig.save(chunk)
    assert chunk.backing is Backing.RAM
    assert all_are(rig.tensors[1], 3.0)
    disk.fault = None
    rig.evict(chunk)  # a second try is possible
    rig.load(chunk)
    assert all_are(rig.tensors[1], 3.0)


def test_file_that_was_cut_short_is_an_error(tmp_path: Path) -> None:
    rig = Rig(SpillFile(tmp_path))
    chunk = rig.evicted(3, 1.0)
    os.ftruncate(rig.disk.fd, 2 * CHUNK)
    with pytest.raises(OSError, match="spill file ends at"):
        rig.load(chunk)
    rig.space.close()


def test_partial_transfers_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_read, real_write, calls = os.preadv, os.pwritev, []

    def half(real: Callable[..., int]) -> Callable[..., int]:
        def move(fd: int, buffers: list[memoryview], offset: int) -> int:
            size = max(len(buffers[0]) // 2 // 4096 * 4096, 4096)
            calls.append(size)
            return real(fd, [buffers[0][:size]], offset)

        return move

    rig = Rig(SpillFile(tmp_path))
    monkeypatch.setattr(os, "preadv", half(real_read))
    monkeypatch.setattr(os, "pwritev", half(real_write))
    chunk = rig.evicted(0, 5.0)
    rig.load(chunk)
    assert all_are(rig.tensors[0], 5.0)
    assert len(calls) > 2
    rig.space.close()


def test_buffered_engine_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def no_direct(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    said: list[str] = []
    monkeypatch.setattr(os, "open", no_direct)
    rig = Rig(SpillFile(tmp_path, announce=said.append))
    assert rig.disk.engine == "buffered"
    assert len(said) == 1
    assert "O_DIRECT is refused" in said[0]
    chunk = rig.evicted(0, 2.0)
    rig.tensors[0].add_(1.0)
    rig.load(chunk)
    assert all_are(rig.tensors[0], 3.0)
    rig.space.close()
