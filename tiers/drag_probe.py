"""Measure what reading takes from the processor, and the processor from reading, side by side.

On a CPU machine they share cores and DRAM: system calls, the copies of a virtual disk, checksums.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.lane import DISK_WORKERS
from offload.tiers.spec import MIB

BLOCK_BYTES = 8 * MIB  # a chunk where nothing is trained
BUFFERS = 3  # of each worker: together more than a cache holds, as in tiers/probe.py
FILE_BYTES = 256 * MIB
ALONE_S, BESIDE_S, PAUSE_S = 0.35, 0.5, 0.05  # of each round
_ROWS, _SIDE, _WEIGHTS = 32, 1024, 6  # of products, as a step's: 24 MiB of weights


class Round(NamedTuple):
    """``together_s`` in which both were busy: what each did would have taken so long alone."""

    together_s: float
    work_s: float
    read_s: float


def beside_share(folder: Path) -> float:
    """That of `Machine`, of the disk under ``folder``; some four seconds. Raises DiskFull.

    Measured with reads and products. It is the same for writes and both directions at once, and for
    updates, which are no products, to within 3% (docs/log.md).
    """
    rounds = side_by_side(_products(), folder)
    return min(statistics.median(r.read_s / r.together_s for r in rounds), 1.0)


def contention(work: Callable[[], object], folder: Path, rounds: int = 3) -> tuple[float, float]:
    """(drag, disk_drag) as in `Compute`, with ``work`` as what computes: the median of rounds.

    Raises DiskFull where 256 MiB cannot be had.
    """
    found = [costs(*each) for each in side_by_side(work, folder, rounds)]
    drag, disk_drag = (statistics.median(f[i] for f in found) for i in (0, 1))
    return drag, disk_drag


def side_by_side(work: Callable[[], object], folder: Path, rounds: int = 3) -> list[Round]:
    """In each round ``work`` is repeated alone; then workers read blocks of a spill file in
    ``folder`` with their checksums as fast as they can, alone and beside ``work``.

    The disk's rate of another minute would not do for the lone one: what computing takes from
    reading is less than what that changes by. Raises DiskFull where 256 MiB cannot be had.
    """
    found = []
    with _reading(folder) as (busy, moved):
        work()  # the first one warms up
        for _ in range(rounds):
            alone, alone_s = _repeat(work, ALONE_S)
            busy.set()
            time.sleep(PAUSE_S)  # until the readers are under way
            start_bytes = sum(moved)
            _, lone_s = _repeat(lambda: time.sleep(PAUSE_S), ALONE_S)
            lone_bytes = max(sum(moved) - start_bytes, BLOCK_BYTES)
            work()
            start_bytes = sum(moved)
            beside, beside_s = _repeat(work, BESIDE_S)
            read_bytes = max(sum(moved) - start_bytes, BLOCK_BYTES)
            busy.clear()
            time.sleep(PAUSE_S)  # what is being read is read to its end
            work_s = beside * alone_s / alone
            found.append(Round(beside_s, work_s, read_bytes * lone_s / lone_bytes))
    return found


def costs(together_s: float, work_s: float, read_s: float) -> tuple[float, float]:
    """(drag, disk_drag) when both, busy all the time, did so many lone seconds' worth together.

    Never negative: the lone rates are of another moment. Computing does not take more from reading
    than its own time, the reads could wait for it.
    """
    drag = (together_s - work_s) / read_s
    disk_drag = (together_s - read_s) / work_s
    return max(drag, 0.0), min(max(disk_drag, 0.0), 1.0)


def _products() -> Callable[[], None]:
    """On all of torch's threads."""
    tokens = torch.ones(_ROWS, _SIDE)
    weights = [torch.ones(_SIDE, _SIDE) for _ in range(_WEIGHTS)]
    out = torch.empty(_ROWS, _SIDE)

    def multiply() -> None:
        with torch.no_grad():
            for weight in weights:
                torch.mm(tokens, weight, out=out)

    return multiply


def _repeat(work: Callable[[], object], least_s: float) -> tuple[int, float]:
    """(times, seconds) of as many repetitions as take so long."""
    begin_s, count = time.perf_counter(), 0
    while True:
        work()
        count += 1
        taken_s = time.perf_counter() - begin_s
        if taken_s >= least_s:
            return count, taken_s


@contextmanager
def _reading(folder: Path) -> Iterator[tuple[threading.Event, list[int]]]:
    """Workers that read while the event is set; the bytes that each has read."""
    disk = SpillFile(folder, announce=lambda _: None)
    busy, over, moved = threading.Event(), threading.Event(), [0] * DISK_WORKERS
    buffers = [vm.reserve(BLOCK_BYTES) for _ in range(DISK_WORKERS * BUFFERS)]

    def read(worker: int) -> None:
        block = worker
        while not over.is_set():
            if not busy.wait(0.1):
                continue
            buffer = buffers[block % len(buffers)]
            disk.read(buffer, BLOCK_BYTES, block * BLOCK_BYTES % FILE_BYTES)
            moved[worker] += BLOCK_BYTES
            block += DISK_WORKERS

    try:
        disk.grow(FILE_BYTES)
        for address in buffers:
            vm.want_huge(address, BLOCK_BYTES)
            vm.fill(address, BLOCK_BYTES, 1)
        for offset in range(0, FILE_BYTES, BLOCK_BYTES):
            disk.push(buffers[0], BLOCK_BYTES, offset)
        with ThreadPoolExecutor(DISK_WORKERS) as pool:
            jobs = [pool.submit(read, worker) for worker in range(DISK_WORKERS)]
            try:
                yield busy, moved
            finally:
                over.set()
        for job in jobs:
            job.result()
    finally:
        for address in buffers:
            vm.release(address, BLOCK_BYTES)
        disk.close()
