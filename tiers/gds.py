"""The spill file through kvikio (the extra ``gds``): the same interface, another engine.

kvikio asks the CUDA driver what kind of memory a pointer is, for host buffers too, so it needs
``libcuda.so.1``; with GPUDirect Storage it can also read straight into device memory. It is
never the default: on host buffers O_DIRECT through huge pages is as fast (docs/log.md).
This engine has not been run on a GPU yet: its tests are marked ``gpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.spec import MIB


class KvikioFile(SpillFile):
    """A spill file whose transfers are kvikio's. Raises ImportError or RuntimeError where the
    package or the CUDA driver is missing."""

    def __init__(
        self, folder: Path, limit_bytes: int | None = None, announce: Callable[[str], None] = print
    ) -> None:
        import kvikio  # the extra; heavy
        import kvikio.defaults

        super().__init__(folder, limit_bytes, announce)
        kvikio.defaults.set({"num_threads": 4, "task_size": 16 * MIB, "auto_direct_io_read": True})
        # The file has no name any more; the descriptor still leads to it.
        self._cufile: Any = kvikio.CuFile(f"/proc/self/fd/{self.fd}", "r+")
        self.engine = "kvikio"

    def pull(self, address: int, size_bytes: int, offset: int) -> None:
        self._move(self._cufile.pread, address, size_bytes, offset)

    def push(self, address: int, size_bytes: int, offset: int) -> None:
        self._move(self._cufile.pwrite, address, size_bytes, offset)

    def close(self) -> None:
        self._cufile.close()
        super().close()

    def _move(self, move: Callable[..., Any], address: int, size_bytes: int, offset: int) -> None:
        memory = np.frombuffer(memoryview(vm.buffer_at(address, size_bytes)), dtype=np.uint8)
        moved = move(memory, size=size_bytes, file_offset=offset).get()
        if moved != size_bytes:
            raise OSError(f"kvikio moved {moved} of {size_bytes} bytes at offset {offset}")
