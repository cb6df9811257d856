"""Weights in 4 or 8 bits: groups of 64 along the input dimension, each with a scale and a zero.

Asymmetric min/max as in FlexGen (Sheng et al. 2023): ``w = code * scale + zero``, 4.5 or 8.5 bits a
weight. A row of a weight is one run of bytes: its codes, its scales, its zeros (float16). Of 4-bit
codes a byte holds column i and column i + n/2 of its row, so that both come out as long runs.

[Note: the same bits everywhere]
A code has at most 8 significant bits and a float16 scale 11, so their product is exact in float32,
fused with the addition or not. Each widened value is rounded once to float32 and once more to the
type that is computed with, whatever device and kernels do it.

[Note: own memory]
All operations write into a `Scratch` that is used again and again: its bytes are known beforehand
and debited once, whatever the operations are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.errors import OffloadError

GROUP = 64
NUMBERS_BYTES = 4  # of a group: scale and zero in float16


@dataclass(frozen=True, slots=True)
class Format:
    """How codes are stored: 4 or 8 ``bits`` each."""

    name: str
    bits: int

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many weights; the last group is filled up."""
        return -(-columns // GROUP) * (GROUP * self.bits // 8 + NUMBERS_BYTES)


FORMATS = {f.name: f for f in (Format("int4", 4), Format("int8", 8))}


def format_of(weight_dtype: str | None) -> Format | None:
    """The format that ``weight_dtype`` names; None for None. Raises OffloadError."""
    if weight_dtype is None:
        return None
    if weight_dtype not in FORMATS:
        raise OffloadError(f"weight_dtype={weight_dtype!r}: give one of {', '.join(FORMATS)}")
    return FORMATS[weight_dtype]


def pack(weights: Tensor, form: Format) -> Tensor:
    """Floating weights [rows, columns] as uint8 [rows, row_bytes(columns)].

    No value is further than half a step of its group from what `unpack` gives in float32. Raises
    ValueError for values that are not finite or beyond float16's range.
    """
    rows, columns = weights.shape
    # What fills up the last group must not widen its range.
    values = pad(weights.float(), (0, -columns % GROUP), mode="replicate").reshape(rows, -1, GROUP)
    least, most = values.aminmax(dim=-1, keepdim=True)  # [rows, groups, 1]
    levels = 2**form.bits - 1
    zero = _float16(least, towards=-np.inf)
    scale = _float16((most - zero.float()) / levels, towards=np.inf)
    if not bool(torch.isfinite(zero).all() and torch.isfinite(scale).all()):
        raise ValueError("values that are not finite, or too large for float16")
    steps = torch.where(scale == 0, 1.0, scale.float())
    codes = ((values - zero.float()) / steps).round_().clamp_(0, levels).to(torch.uint8)
    codes = codes.view(rows, -1)
    if form.bits == 4:
        low, high = codes.chunk(2, dim=1)
        codes = low | high << 4
    numbers = torch.cat((scale, zero), 1).view(rows, -1)  # all scales, then all zeros
    return torch.cat((codes, numbers.view(torch.uint8)), 1)


@dataclass(frozen=True, slots=True)
class _Views:
    """A scratch seen as a block of one shape. Making views takes as long as some of the work."""

    low: Tensor  # [rows, columns / 2], of codes: their first and their second half
    high: Tensor
    codes: Tensor  # [rows, groups, GROUP]
    numbers: Tensor  # [rows, 2 * groups]
    scale: Tensor  # [rows, groups, 1], of numbers
    zero: Tensor
    values: Tensor  # [rows, groups, GROUP]
    result: Tensor  # [rows, columns] in the type that is computed with; maybe that of values


class Scratch:
    """Memory to widen up to ``elements`` weights in (whole groups), on the CPU."""

    def __init__(self, elements: int, device: torch.device | None = None) -> None:
        self.elements = elements
        self._codes = torch.empty(elements, dtype=torch.uint8, device=device)
        self._values = torch.empty(elements, device=device)
        self._numbers = torch.empty(2 * elements // GROUP, device=device)
        self._narrow = torch.empty(2 * elements, dtype=torch.uint8, device=device)
        self._views: dict[tuple[int, int, torch.dtype], _Views] = {}  # by rows, groups, type
        self._lock = threading.Lock()

    @staticmethod
    def bytes_for(elements: int) -> int:
        """What one takes."""
        return (1 + 4 + 2) * elements + 8 * elements // GROUP

    @contextmanager
    def borrowed(self, device: torch.device) -> Iterator[Scratch]:
        """This, or one for the moment where this is in use or on another device."""
        if device != self._values.device or not self._lock.acquire(blocking=False):
            yield Scratch(self.elements, device)
            return
        try:
            yield self
        finally:
            self._lock.release()

    def unpack(self, packed: Tensor, form: Format, dtype: torch.dtype) -> Tensor:
        """uint8 [rows, row_bytes(columns)] as ``dtype`` [rows, columns and what fills them up].

        What is returned is overwritten by the next call.
        """
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return self.unpack(packed, form, torch.float32).to(dtype)
        rows, groups = packed.shape[0], packed.shape[1] // form.row_bytes(GROUP)
        views = self._views.get((rows, groups, dtype)) or self._look(rows, groups, dtype)
        stored = packed[:, : groups * GROUP * form.bits // 8]
        views.numbers.copy_(packed[:, stored.shape[1] :].view(torch.float16))
        if form.bits == 8:
            views.values.copy_(stored.view_as(views.values))
        else:
            torch.bitwise_and(stored, 15, out=views.low)
            torch.bitwise_right_shift(stored, 4, out=views.high)
            views.values.copy_(views.codes)
        views.values.mul_(views.scale).add_(views.zero)
        if dtype is not torch.float32:
            views.result.view_as(views.values).copy_(views.values)
        return views.result

    def _look(self, rows: int, groups: int, dtype: torch.dtype) -> _Views:
        size, shape = rows * groups * GROUP, (rows, groups, GROUP)
        codes, values = self._codes[:size], self._values[:size]
        numbers = self._numbers[: 2 * rows * groups].view(rows, 2, groups, 1)
        own = values if dtype is torch.float32 else self._narrow[: 2 * size].view(dtype)
        low, high = codes.view(rows, -1).chunk(2, dim=1)
        views = self._views[rows, groups, dtype] = _Views(
            low, high, codes.view(shape), numbers.view(rows, -1), numbers[:, 0], numbers[:, 1],
            values.view(shape), own.view(rows, -1),
        )  # fmt: skip
        return views

    def __deepcopy__(self, memo: object) -> Scratch:
        return Scratch(self.elements)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, (self.elements,)


def _float16(values: Tensor, *, towards: float) -> Tensor:
    """The nearest float16 value on one side of each."""
    rounded = values.half().numpy()
    exact = values.numpy()
    wrong = rounded > exact if towards < 0 else rounded < exact
    moved = np.nextafter(rounded, np.float16(towards))
    return torch.from_numpy(np.where(wrong, moved, rounded))
