"""Host memory that CUDA has registered: copies from and to it go over the bus by themselves.

torch's own pinned allocator would round up to a power of two; what is registered here is what was
given. Registering is public in torch (``torch.cuda.cudart()``), pages need not be small ones.
"""

from __future__ import annotations

import contextlib
import warnings
from bisect import bisect_right

import torch
from torch import Tensor

from offload.tiers.spec import format_size


class Pinned:
    """Ranges of host memory, registered until ``close``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._starts: list[int] = []
        self._ranges: list[tuple[int, int, object]] = []  # start, end, what keeps it mapped

    @property
    def size_bytes(self) -> int:
        """Registered now."""
        return sum(end - start for start, end, _ in self._ranges)

    def add(self, address: int, size_bytes: int, owner: object = None) -> bool:
        """Register a range, whose ``owner`` is kept; False, and a warning, where CUDA refuses."""
        # The context must be the device's: registering would make one on the current device.
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))
            if code == 0:
                at = bisect_right(self._starts, address)
                self._starts.insert(at, address)
                self._ranges.insert(at, (address, address + size_bytes, owner))
                return True
            warnings.warn(
                f"{format_size(size_bytes)} of host memory could not be pinned (CUDA error {code}):"
                " copies to and from the device will be slow; raise the limit of locked memory "
                "(ulimit -l)",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            with contextlib.suppress(RuntimeError):
                # CUDA keeps the error, and the next launch of a kernel would be blamed for it.
                torch.zeros(1, device=self._device)
        return False

    def holds(self, tensor: Tensor) -> bool:
        """Whether all of a dense CPU tensor lies in one registered range."""
        at = bisect_right(self._starts, tensor.data_ptr()) - 1
        return at >= 0 and tensor.data_ptr() + tensor.nbytes <= self._ranges[at][1]

    def close(self) -> None:
        """Take all of it back; no copy is in flight. Raises RuntimeError where CUDA refuses."""
        with torch.cuda.device(self._device):
            while self._ranges:
                address, _, _ = self._ranges.pop()
                self._starts.pop()
                code = int(torch.cuda.cudart().cudaHostUnregister(address))
                if code != 0:
                    raise RuntimeError(f"pinned memory could not be released (CUDA error {code})")
