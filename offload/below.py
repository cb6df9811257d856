"""What lies below the tier where activations are, as the choice of what to swap sees it.

Rates are measured ones: of the disk when it was probed, of the bus while steps were recorded.
"""

from __future__ import annotations

import time
from typing import Protocol

from offload.engine import Engine
from offload.prefetch.policy import PASSES, Link
from offload.prefetch.trace import Trace
from offload.swap_disk import SwapStore
from offload.tiers.spec import Machine


class Below(Protocol):
    """Asked between steps."""

    def look(self, trace: Trace, swapped_bytes: int) -> None:
        """Note the traffic since the last look; of all bytes moved so many were no chunks.

        ``trace``: of the step since then, if there was one.
        """
        ...

    def link(self) -> Link | None:
        """Rates of the way down and back; None: nothing can be sent there."""
        ...

    @property
    def working_bytes(self) -> int:
        """Memory above that this takes beside activations."""
        ...

    @property
    def displace_s_per_byte(self) -> float:
        """Seconds that a byte of chunks costs which leaves and comes back once a step."""
        ...


class DiskBelow:
    """The disk, below the host's memory."""

    def __init__(self, engine: Engine, machine: Machine, store: SwapStore) -> None:
        self._engine = engine
        self._machine = machine
        self._store = store
        self._busy = 0.0  # share of its time
        self._since = self._now(0)

    def look(self, trace: Trace, swapped_bytes: int) -> None:
        then, now = self._since, self._now(swapped_bytes)
        self._since = now
        seconds, read, written, swapped = (b - a for a, b in zip(then, now, strict=True))
        busy_s = self._machine.disk_s(max(read - swapped / 2, 0), max(written - swapped / 2, 0))
        self._busy = min(busy_s / max(seconds, 1e-9), 1.0)

    def link(self) -> Link:
        machine = self._machine
        return Link(
            machine.write_bytes_per_s, machine.read_bytes_per_s, 1.0 - self._busy,
            machine.copy_bytes_per_s,
        )  # fmt: skip

    @property
    def working_bytes(self) -> int:
        return self._store.staging_bytes

    @property
    def displace_s_per_byte(self) -> float:
        """The disk's part is hidden as far as the disk is idle; the processor's is not.

        That is checksums, pages moved, compute threads held up: as for activations that are
        swapped. With a third of it "auto" moved 64 MiB a step for two units more that it kept, and
        was 5% slower than running all again (docs/log.md).
        """
        machine = self._machine
        disk_s = 1 / machine.read_bytes_per_s + 1 / machine.write_bytes_per_s
        return self._busy * disk_s + 2 * PASSES / machine.copy_bytes_per_s

    def _now(self, swapped_bytes: int) -> tuple[float, int, int, int]:
        lanes = self._engine.space.lanes
        moved = lanes["read"].meter.moved_bytes, lanes["write"].meter.moved_bytes
        return time.perf_counter(), *moved, swapped_bytes
