"""Homes: addresses stay, backings change, and nothing that a user wrote is lost on the way."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.frames import POISON_BYTE, FramePool
from offload.tiers.home import Backing, HomeSpace
from offload.tiers.layout import lay_out
from tests.homes import CHUNK, ELEMENTS, HeldLane, Rig, SlowDisk, all_are


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


@pytest.mark.parametrize("gone", [True, False])
def test_a_write_before_the_copy_was_ordered_needs_no_look_at_the_home(
    rig: Rig, gone: bool
) -> None:
    """Nobody's code ran since: what was read is what was written, and its checksum says so."""
    chunk, other = rig.evicted(0, 1.0), rig.evicted(1, 2.0)
    rig.tensors[0].fill_(8.0)
    if gone:
        os.fsync(rig.disk.fd)
        vm.map_file(chunk.address, chunk.size_bytes, rig.disk.fd, chunk.offset)
        os.posix_fadvise(rig.disk.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for each in (chunk, other):
        rig.space.start_load(each)
    for each in (chunk, other):
        rig.space.install(each, user_code=False)
    assert all_are(rig.tensors[0], 8.0)
    assert all_are(rig.tensors[1], 2.0)
    assert rig.space.unchanged(chunk)


def test_write_beside_a_staged_copy_that_has_left_the_page_cache_is_kept(rig: Rig) -> None:
    chunk = rig.evicted(0, 1.0)
    rig.space.start_load(chunk)
    rig.read.run_all()
    rig.tensors[0].fill_(8.0)
    os.fsync(rig.disk.fd)
    vm.map_file(chunk.address, chunk.size_bytes, rig.disk.fd, chunk.offset)
    os.posix_fadvise(rig.disk.fd, 0, 0, os.POSIX_FADV_DONTNEED)
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


def test_void_chunk_that_nobody_wrote_to_after_all_is_believed(rig: Rig) -> None:
    rig.space.trust_file(rig.space.chunks[2])
    rig.load(rig.space.chunks[2])
    assert all_are(rig.tensors[2], 0.0)


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
