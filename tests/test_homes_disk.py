"""Homes on a disk that fails or lies: an error where it is awaited, never a wrong number."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.home import Backing, CorruptChunk
from tests.homes import CHUNK, ELEMENTS, Rig, SlowDisk, all_are


class FaultyDisk(SlowDisk):
    """A spill file that fails, or lies, when it is told to."""

    fault: str | None = None

    def pull(self, address: int, size_bytes: int, offset: int) -> None:
        if self.fault == "eio":
            raise OSError(errno.EIO, "Input/output error")
        super().pull(address, size_bytes, offset)
        if self.fault in ("bit", "bit once"):
            self.fault = "bit" if self.fault == "bit" else None
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


@pytest.mark.parametrize("user_code", [True, False])
def test_flipped_bit_is_an_error(faulty: tuple[Rig, FaultyDisk], user_code: bool) -> None:
    rig, disk = faulty
    chunk = rig.evicted(2, 1.0)
    disk.fault = "bit"
    rig.space.start_load(chunk)
    with pytest.raises(CorruptChunk, match=r"from offset 32768 .* is different from what was"):
        rig.space.install(chunk, user_code=user_code)
    disk.fault = None
    assert all_are(rig.tensors[2], 1.0)  # the home still shows the file


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


def test_flipped_bit_beside_a_written_page_is_never_believed(
    faulty: tuple[Rig, FaultyDisk],
) -> None:
    rig, disk = faulty
    chunk, other = rig.fill(2, 1.0), rig.fill(1, 2.0)
    chunk.sparse = True  # no readahead: only the written page gets into the cache
    rig.evict(chunk)
    disk.during_write = lambda: rig.tensors[2][:4].fill_(8.0)  # the file's time will not show it
    rig.save(other)
    disk.fault = "bit once"
    with pytest.raises(CorruptChunk, match="is different from what was written"):
        rig.load(chunk)
    rig.load(chunk)  # a second try is possible
    assert rig.tensors[2].tolist() == [8.0] * 4 + [1.0] * (ELEMENTS - 4)


def test_flipped_bit_after_a_write_elsewhere_is_never_believed(
    faulty: tuple[Rig, FaultyDisk],
) -> None:
    rig, disk = faulty
    chunk, other = rig.evicted(2, 1.0), rig.fill(1, 2.0)
    other.sparse = True  # no readahead into the next chunk
    rig.evict(other)
    rig.tensors[1].fill_(8.0)  # the file's time moves
    disk.fault = "bit once"
    rig.load(chunk)  # the second reading is right
    assert all_are(rig.tensors[2], 1.0)


def test_flipped_bit_in_buffered_reads_is_an_error(faulty: tuple[Rig, FaultyDisk]) -> None:
    rig, disk = faulty
    chunk = rig.evicted(2, 1.0)
    disk.engine = "buffered"
    assert all_are(rig.tensors[2], 1.0)
    with open(disk.fd, "r+b", closefd=False) as file:  # wrong in the page cache: the disk's doing
        file.seek(chunk.offset + 4097)
        file.write(b"x")
    disk.foreign_write()  # as if the file's time had not moved
    with pytest.raises(CorruptChunk, match="is different from what was written"):
        rig.load(chunk)


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
    assert chunk.dirty, "its only copy is in memory"
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
