"""The spill file through kvikio: its calls, against a module of that name over ordinary reads.

kvikio itself needs a CUDA driver for host buffers too, so what it does is not tested here.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import offload
from offload.config import Tuning
from offload.errors import OffloadError
from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.gds import DiskIORefused, KvikioFile, spill_file
from offload.tiers.home import CorruptChunk
from offload.tiers.spec import KIB
from tests.conftest import MACHINE, build_mlp

CHUNK = 16 * KIB


class Future:
    """What kvikio's calls return."""

    def __init__(self, moved: int) -> None:
        self._moved = moved

    def get(self) -> int:
        return self._moved


class CuFile:
    """kvikio's, for host memory. ``short``: bytes that each transfer lacks."""

    short = 0
    moved = 0

    def __init__(self, path: str, flags: str) -> None:
        assert flags == "r+"
        self._fd = os.open(path, os.O_RDWR)

    def pread(self, buf: Any, size: int, file_offset: int) -> Future:
        done = os.preadv(self._fd, [memoryview(buf)[:size]], file_offset)
        CuFile.moved += done
        return Future(done - self.short)

    def pwrite(self, buf: Any, size: int, file_offset: int) -> Future:
        CuFile.moved += size
        return Future(os.pwritev(self._fd, [memoryview(buf)[:size]], file_offset) - self.short)

    def close(self) -> None:
        os.close(self._fd)


class NoDriver(CuFile):
    """As kvikio does without libcuda."""

    def pwrite(self, buf: Any, size: int, file_offset: int) -> Future:
        raise RuntimeError("libcuda.so.1: cannot open shared object file")


def install(monkeypatch: pytest.MonkeyPatch, file: type[CuFile] = CuFile) -> None:
    module, defaults = ModuleType("kvikio"), ModuleType("kvikio.defaults")
    module.CuFile, module.defaults = file, defaults  # type: ignore[attr-defined]
    defaults.set = lambda told: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvikio", module)
    monkeypatch.setitem(sys.modules, "kvikio.defaults", defaults)
    monkeypatch.setattr(CuFile, "moved", 0)


@pytest.fixture(params=["direct", "kvikio"])
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A spill file of 64 KiB, by either engine."""
    install(monkeypatch)
    made = spill_file(request.param, tmp_path, None, print)
    assert isinstance(made, KvikioFile) == (request.param == "kvikio")
    made.grow(4 * CHUNK)
    yield made
    made.close()


def test_what_was_written_comes_back_with_its_checksum(disk: SpillFile) -> None:
    source, target = vm.reserve(CHUNK), vm.reserve(CHUNK)
    for number in range(4):
        vm.fill(source, CHUNK, number + 1)
        wrote = disk.write(source, CHUNK, number * CHUNK)
        assert disk.read(target, CHUNK, number * CHUNK) == wrote
        assert vm.buffer_at(target, CHUNK).raw == bytes([number + 1]) * CHUNK
    assert not disk.foreign_write()
    vm.release(source, CHUNK)
    vm.release(target, CHUNK)


def test_a_short_transfer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    disk = KvikioFile(tmp_path)
    disk.grow(CHUNK)
    memory = vm.reserve(CHUNK)
    monkeypatch.setattr(CuFile, "short", 8)
    for move in (disk.read, disk.write):
        with pytest.raises(OSError, match=f"moved {CHUNK - 8} of {CHUNK} bytes at offset 0"):
            move(memory, CHUNK, 0)
    vm.release(memory, CHUNK)
    disk.close()


def test_where_it_is_missing_that_is_said_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(DiskIORefused, match=r"offload\[gds\]"):
        spill_file("kvikio", tmp_path, None, print)
    install(monkeypatch, NoDriver)
    with pytest.raises(OffloadError, match=r"libcuda.so.1.*disk_io=\"direct\""):
        offload.wrap(build_mlp(), disk=tmp_path, tuning=Tuning(disk_io="kvikio", machine=MACHINE))
    with pytest.raises(OffloadError, match="disk_io='tape'"):
        offload.wrap(build_mlp(), disk=tmp_path, tuning=Tuning(disk_io="tape", machine=MACHINE))
    assert set(os.listdir("/proc/self/fd")) <= before
    assert list(tmp_path.iterdir()) == []


def train(folder: Path, disk_io: str) -> tuple[list[torch.Tensor], Any]:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tuning = Tuning(chunk_bytes=65536, machine=MACHINE, disk_io=disk_io)
    offload.wrap(model, optimizer, host_memory="600KiB", disk=folder, tuning=tuning)
    for _ in range(3):
        model(torch.ones(4, 128)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], offload.runtime(model)


def test_a_run_has_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    direct, first = train(tmp_path, "direct")
    assert CuFile.moved == 0
    through, second = train(tmp_path, "kvikio")
    assert CuFile.moved > 4_000_000
    assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))
    first.close()
    second.close()


def test_corruption_is_an_error_though_pages_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that the engine itself left in the cache are no sign of a write by the user."""
    install(monkeypatch)
    _, run = train(tmp_path, "kvikio")
    engine = run.parts.engine
    engine.evict_all()
    chunk = next(c for c in engine.space.chunks if c.label.startswith("weights"))
    pread = CuFile.pread

    def wrong(self: CuFile, buf: Any, size: int, file_offset: int) -> Future:
        done = pread(self, buf, size, file_offset)
        memoryview(buf)[0] ^= 1
        return done

    monkeypatch.setattr(CuFile, "pread", wrong)
    cached = vm.take_cached

    def nothing_else(source: int, target: int, size_bytes: int) -> bool:
        cached(source, target, size_bytes)
        vm.buffer_at(target, 1)[0] = bytes([vm.buffer_at(target, 1).raw[0] ^ 1])
        return True

    monkeypatch.setattr(vm, "take_cached", nothing_else)
    engine.space.start_load(chunk)
    with pytest.raises(CorruptChunk, match="different from what was written"):
        engine.space.install(chunk)
    monkeypatch.undo()
    run.close()
