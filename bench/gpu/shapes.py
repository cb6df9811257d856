"""The shapes that are trained, and the host they are cut to. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

GB = 10**9
HOST_SHARE = 0.75  # of the host's memory, for a model with its gradients and state
HOST_GIVEN = 0.88  # of the host's memory, as the budget
KEPT_FREE = 0.06  # of a cap, for what torch's allocator cannot use and kernels take for a moment


@dataclass(frozen=True)
class Shape:
    """A Llama's dimensions; heads of 128, embeddings not tied."""

    hidden: int
    layers: int
    inner: int
    vocabulary: int = 32000
    head: int = 128

    @property
    def parameters(self) -> int:
        """How many there are."""
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.inner + 2 * self.hidden
        return self.layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


SHAPES = {"1.3b": Shape(2048, 24, 5504), "3b": Shape(3072, 26, 8192)}
TINY = Shape(64, 3, 112, 192, 16)
LAYER_OF_LARGEST = Shape(4096, 1, 11008)
LORA = replace(LAYER_OF_LARGEST, layers=32)


def named(name: str, host_bytes: int) -> Shape:
    """A shape by name; the largest is what full training of fits this host."""
    if name != "largest":
        return SHAPES[name]
    room = HOST_SHARE * host_bytes / 16
    one, two = (replace(LAYER_OF_LARGEST, layers=n).parameters for n in (1, 2))
    return replace(LAYER_OF_LARGEST, layers=max(int((room - one) / (two - one)) + 1, 1))


def memory_bytes(host_gb: float | None) -> int:
    """The host's memory: what was told, else what is measured now."""
    if host_gb is not None:
        return int(host_gb * GB)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
