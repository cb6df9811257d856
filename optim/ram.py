"""The simplest `Store`: everything is in RAM all the time. For benchmarks and tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.optim.mirror import OptimizerProfile
from offload.optim.mixed import Mixed
from offload.optim.pieces import align_elements
from offload.optim.state import Segment, UpdateGroup
from offload.tiers.spec import MIB, round_up

_ALIGN_BYTES = 64
_SLAB_BYTES = 4 * MIB


class RamStore:
    """Groups of at most ``group_elements`` elements; state homes are slices of large slabs."""

    def __init__(
        self, optimizer: Optimizer, profile: OptimizerProfile, group_elements: int = 1 << 24,
        mixed: Mixed | None = None,
    ) -> None:  # fmt: skip
        self.mixed = mixed
        self._optimizer = optimizer
        self._profile = profile
        self._group_elements = group_elements
        self._homes: dict[tuple[nn.Parameter, str], Tensor] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used_bytes = 0

    def groups(self) -> Sequence[UpdateGroup]:
        """The optimizer's parameters in order; long ones are cut where that is allowed."""
        groups: list[UpdateGroup] = []
        segments: list[Segment] = []
        room = self._group_elements
        for segment in self._segments():
            if segments and segment.stop - segment.start > room:
                groups.append(UpdateGroup(len(groups), tuple(segments)))
                segments, room = [], self._group_elements
            segments.append(segment)
            room -= segment.stop - segment.start
        if segments:
            groups.append(UpdateGroup(len(groups), tuple(segments)))
        return groups

    def _segments(self) -> Sequence[Segment]:
        segments = []
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                known = self._profile.params.get(p)
                step = max(p.numel(), 1)
                if known is not None and known.elementwise and p.is_contiguous():
                    step = round_up(self._group_elements, align_elements(p.dtype))
                starts = range(0, max(p.numel(), 1), step)
                segments += [Segment(p, a, min(a + step, p.numel())) for a in starts]
        return segments

    def enter(self, group: UpdateGroup) -> None:
        """Nothing to do: all is resident."""

    def leave(self, group: UpdateGroup) -> None:
        """Nothing to do: homes are where the update wrote."""

    def home_of_state(
        self, param: nn.Parameter, name: str, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor | None:
        """A slice of a slab, the same at each call unless the shape or dtype changes."""
        home = self._homes.get((param, name))
        if home is None or home.shape != shape or home.dtype != dtype:
            home = self._allocate(math.prod(shape), dtype).view(shape)
            self._homes[param, name] = home
        return home

    def _allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        size_bytes = round_up(elements * dtype.itemsize, _ALIGN_BYTES)
        if self._used_bytes + size_bytes > self._slab.numel():
            wanted = max(_SLAB_BYTES, size_bytes, self._profile.state_bytes)
            self._slab, self._used_bytes = torch.empty(wanted, dtype=torch.uint8), 0
        start, self._used_bytes = self._used_bytes, self._used_bytes + size_bytes
        return self._slab[start : start + elements * dtype.itemsize].view(dtype)
