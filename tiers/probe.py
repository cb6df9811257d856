"""Measure the machine: each lane alone, and the disk's two directions, and it beside computing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.drag_probe import beside_share
from offload.tiers.lane import DISK_WORKERS
from offload.tiers.spec import GIB, MIB, Machine

BLOCK_BYTES = 8 * MIB
# Moved to and from more memory than a processor's cache holds, as chunks are: into 32 MiB a virtual
# disk, whose host copies, read 1.2 times as fast as into 96 or 384 (docs/log.md).
MEMORY_BYTES = 96 * MIB


def probe(
    folder: Path, size_bytes: int = GIB // 2, rounds: int = 3, memory_bytes: int = MEMORY_BYTES
) -> Machine:
    """Measured rates of the disk under ``folder`` and of host copies; a few seconds.

    Blocks of 8 MiB through huge-page buffers, which take turns in ``memory_bytes``, O_DIRECT where
    the file system takes it; the median of ``rounds``. Raises DiskFull where ``size_bytes`` cannot
    be had.
    """
    disk = SpillFile(folder, announce=lambda _: None)
    disk.grow(size_bytes)
    blocks = size_bytes // BLOCK_BYTES
    buffers = [_buffer() for _ in range(memory_bytes // BLOCK_BYTES)]
    with ThreadPoolExecutor(2 * DISK_WORKERS) as pool:

        def run(own: list[int], move: Callable[[int, int, int], object], part: range) -> float:
            for block, buffer in zip(part, itertools.cycle(own), strict=False):
                move(buffer, BLOCK_BYTES, block * BLOCK_BYTES)
            return time.perf_counter()

        def rate(directions: list[Callable[[int, int, int], object]]) -> list[float]:
            """Bytes/s of each direction while all of them run, over the first one's duration."""
            begin_s, jobs = time.perf_counter(), []
            for d, move in enumerate(directions):
                half = blocks // len(directions)
                for w in range(DISK_WORKERS):
                    part = range(d * half + w, (d + 1) * half, DISK_WORKERS)
                    own = buffers[d * DISK_WORKERS + w :: len(directions) * DISK_WORKERS]
                    jobs.append(pool.submit(run, own, move, part))
            ends = [j.result() for j in jobs]
            return [
                blocks // len(directions) * BLOCK_BYTES
                / (max(ends[d * DISK_WORKERS : (d + 1) * DISK_WORKERS]) - begin_s)
                for d in range(len(directions))
            ]  # fmt: skip

        rate([disk.push])  # the file's blocks are written once before anything is measured
        samples = [
            (rate([disk.pull]), rate([disk.push]), rate([disk.pull, disk.push]))
            for _ in range(rounds)
        ]
    copy = statistics.median(_copy_rate(buffers[0], buffers[1]) for _ in range(5))
    for address in buffers:
        vm.release(address, BLOCK_BYTES)
    disk.close()
    read, write = (statistics.median(s[i][0] for s in samples) for i in (0, 1))
    mixed_read, mixed_write = (statistics.median(s[2][i] for s in samples) for i in (0, 1))
    return Machine(read, write, min(mixed_read, read), min(mixed_write, write), copy)


def probe_machine(folder: Path) -> Machine:
    """All that is planned with, without a link to a GPU; some eight seconds. Raises DiskFull."""
    return replace(probe(folder), beside_share=beside_share(folder))


def cached_probe(folder: Path) -> Machine:
    """What was measured last of this folder's device by this user; if nothing, what is now."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        kept = json.loads(remembered_at(folder).read_text())
        if kept.keys() == {f.name for f in fields(Machine)}:  # another version's has others
            return Machine(**kept)
    machine = probe_machine(folder)
    remember(folder, machine)
    return machine


def remembered_at(folder: Path, what: str = "machine") -> Path:
    """Where figures of the device under a folder are kept, per user and machine: its rates."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offload"
    return base / f"{what}-{os.uname().nodename}-{os.stat(folder).st_dev}.json"


def remember(folder: Path, machine: Machine) -> None:
    """Keep measured rates; where that is not possible the next run measures again."""
    keep(remembered_at(folder), machine.to_dict())


def keep(file: Path, figures: dict[str, Any]) -> bool:
    """Write what was measured, whole or not at all, as JSON. Whether that was possible."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(figures))
        fresh.replace(file)
    except OSError:
        return False
    return True


def _buffer() -> int:
    address = vm.reserve(BLOCK_BYTES)
    vm.want_huge(address, BLOCK_BYTES)
    vm.fill(address, BLOCK_BYTES, 1)
    return address


def _copy_rate(source: int, target: int) -> float:
    begin_s = time.perf_counter()
    memoryview(vm.buffer_at(target, BLOCK_BYTES)).cast("B")[:] = memoryview(
        vm.buffer_at(source, BLOCK_BYTES)
    ).cast("B")
    return BLOCK_BYTES / (time.perf_counter() - begin_s)
