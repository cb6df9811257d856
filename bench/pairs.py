"""Plain reads between the passes of a run: what its disk gives in the very seconds of its steps.

The disk of a rented machine changes its pace within a minute, so a bound from a probe of another
minute says little. ``Turns`` is called after every pass: a turn is some passes, after which the
workers of a lane read plainly, with nothing else to do.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from offload.run import Runtime
from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.lane import DISK_WORKERS
from offload.tiers.spec import MIB

READ_S, FILE_BYTES = 0.6, 1024 * MIB
# Memory that is read into: a run's is no smaller. Into two buffers of 8 MiB, which stay in some
# cache, this machine's disk gives a tenth more (docs/log.md).
MEMORY_BYTES = 128 * MIB


class PlainReads:
    """Reads as a lane's workers do, in blocks of a run's chunks, and nothing else."""

    def __init__(self, folder: Path, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._disk = SpillFile(folder, announce=lambda _: None)
        self._blocks = FILE_BYTES // block_bytes
        self._disk.grow(self._blocks * block_bytes)
        self._memory = vm.reserve(MEMORY_BYTES)
        vm.want_huge(self._memory, MEMORY_BYTES)
        vm.fill(self._memory, MEMORY_BYTES, 1)
        for block in range(self._blocks):
            self._disk.push(self._memory, block_bytes, block * block_bytes)
        self._pool = ThreadPoolExecutor(DISK_WORKERS)

    def rate(self) -> float:
        """Bytes per second now."""
        size_bytes, begin_s = self._block_bytes, time.perf_counter()
        places = MEMORY_BYTES // size_bytes

        def read(worker: int) -> int:
            block = worker
            while time.perf_counter() - begin_s < READ_S:
                place, offset = block % places, block % self._blocks
                self._disk.pull(self._memory + place * size_bytes, size_bytes, offset * size_bytes)
                block += DISK_WORKERS
            return (block - worker) // DISK_WORKERS * size_bytes

        moved = sum(self._pool.map(read, range(DISK_WORKERS)))
        return moved / (time.perf_counter() - begin_s)


class Turns:
    """Called after every pass; ``found``: for each turn seconds and bytes of a pass, and the rate.

    ``warm``: passes that are recorded, or replayed without or with a first plan. The first pass of
    a turn is not counted: it begins with more read ahead than the others.
    """

    def __init__(self, run: Runtime, folder: Path, passes: int, warm: int) -> None:
        self.found: list[dict[str, float]] = []
        self._meter = run.parts.engine.space.lanes["read"].meter
        chunk_bytes = max(c.size_bytes for c in run.parts.engine.space.chunks)
        self._plain = PlainReads(folder, chunk_bytes)
        self._passes = passes
        self._count = -warm
        self._began = (0.0, 0)

    def __call__(self, *_: Any) -> None:
        self._count += 1
        if self._count <= 0:
            return
        now = (time.perf_counter(), self._meter.moved_bytes)
        in_turn = self._count % (self._passes + 1)
        if in_turn == 1:
            self._began = now
        elif in_turn == 0:
            pass_s, moved = ((b - a) / self._passes for a, b in zip(self._began, now, strict=True))
            self._await_reading_ahead()
            rate = self._plain.rate()
            self.found.append({
                "pass_s": pass_s, "read_bytes": moved, "bytes_per_s": rate,
                "over_reads": pass_s * rate / moved if moved else 0.0,
            })  # fmt: skip

    def _await_reading_ahead(self) -> None:
        """It ends when there is no room left."""
        before = -1
        while before != self._meter.transfers:
            before = self._meter.transfers
            time.sleep(0.05)
