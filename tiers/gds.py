"""The spill file through kvikio (the extra ``gds``): the same interface, another engine.

kvikio asks the CUDA driver what kind of memory a pointer is, for host buffers too, so it needs
``libcuda.so.1``. Never the default: on host buffers O_DIRECT through huge pages is as fast
(docs/log.md). Asked for by ``Tuning(disk_io="kvikio")``, to measure one against the other where
there is a GPU. Pages of the file may stay in the page cache, as with buffered I/O.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.spec import MIB


class DiskIORefused(OSError):  # noqa: N818 (as DiskFull: a condition of the machine)
    """The engine that was asked for is not known, or not here."""


def spill_file(
    disk_io: str, folder: Path, limit_bytes: int | None, announce: Callable[[str], None]
) -> SpillFile:
    """``disk_io``: "direct" or "kvikio". Raises DiskIORefused, OSError."""
    if disk_io not in ("direct", "kvikio"):
        raise DiskIORefused(f'disk_io={disk_io!r}: give "direct" or "kvikio"')
    if disk_io == "direct":
        return SpillFile(folder, limit_bytes, announce)
    try:
        return KvikioFile(folder, limit_bytes, announce)
    except (ImportError, RuntimeError) as error:
        raise DiskIORefused(
            'disk_io="kvikio" needs the package (pip install "offload[gds]") and a CUDA driver, '
            f'libcuda.so.1: {error}; leave it out for disk_io="direct"'
        ) from error


class KvikioFile(SpillFile):
    """A spill file whose transfers are kvikio's. Raises ImportError or RuntimeError where the
    package or the CUDA driver is missing; nothing is left behind then."""

    def __init__(
        self, folder: Path, limit_bytes: int | None = None, announce: Callable[[str], None] = print
    ) -> None:
        import kvikio  # the extra; heavy
        import kvikio.defaults

        super().__init__(folder, limit_bytes, announce)
        kvikio.defaults.set({"num_threads": 4, "task_size": 16 * MIB, "auto_direct_io_read": True})
        # The file has no name any more; the descriptor still leads to it.
        self._cufile: Any = None
        try:
            self._cufile = kvikio.CuFile(f"/proc/self/fd/{self.fd}", "r+")
            self._try_out()
        except RuntimeError:
            self.close()
            raise
        self.engine = "kvikio"

    def pull(self, address: int, size_bytes: int, offset: int) -> None:
        self._move(self._cufile.pread, address, size_bytes, offset)

    def push(self, address: int, size_bytes: int, offset: int) -> None:
        self._move(self._cufile.pwrite, address, size_bytes, offset)

    def close(self) -> None:
        if self._cufile is not None:
            self._cufile.close()
        super().close()

    def _try_out(self) -> None:
        """A page there and back: without a driver that fails, though all is imported."""
        page = vm.reserve(vm.PAGE_BYTES)
        try:
            vm.fill(page, vm.PAGE_BYTES, 0x5A)
            self.push(page, vm.PAGE_BYTES, 0)
            self.pull(page, vm.PAGE_BYTES, 0)
        finally:
            vm.release(page, vm.PAGE_BYTES)
            os.ftruncate(self.fd, 0)

    def _move(self, move: Callable[..., Any], address: int, size_bytes: int, offset: int) -> None:
        memory = np.frombuffer(memoryview(vm.buffer_at(address, size_bytes)), dtype=np.uint8)
        moved = move(memory, size=size_bytes, file_offset=offset).get()
        if moved != size_bytes:
            raise OSError(f"kvikio moved {moved} of {size_bytes} bytes at offset {offset}")
