"""Keys and values in 4 or 2 bits: keys per channel, values per token, asymmetric.

After KIVI (Liu et al., ICML 2024, arXiv:2402.02750): keys have a few channels that are large in
all tokens, so keys are coded in groups of tokens of one channel; values have no such channels and
are coded in groups of channels of one token. Each group has its least value and its step in
float16, and codes are chosen by these stored numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from offload.errors import OffloadError

GROUP = 32  # tokens, or channels, that share a least value and a step
BITS = {"int4": 4, "int2": 2}
_HALF_MAX = 65504.0


@dataclass(slots=True)
class SquaredError:
    """Sums over what was coded so far."""

    error: float = 0.0
    power: float = 0.0

    def add(self, exact: Tensor, decoded: Tensor) -> None:
        exact = exact.float()
        self.error += float((exact - decoded.float()).square().sum(dtype=torch.float64))
        self.power += float(exact.square().sum(dtype=torch.float64))

    @property
    def relative(self) -> float | None:
        """Mean squared error over mean square; None before anything was coded."""
        return self.error / self.power if self.power else None


@dataclass(frozen=True, slots=True)
class Kivi:
    """Codes blocks of keys [batch, heads, tokens, dim] and values alike; ``bits`` 4 or 2."""

    bits: int

    def stored_bytes(self, keys: torch.Size, values: torch.Size) -> int:
        """Bytes of one coded block. Raises OffloadError for shapes that do not divide."""
        return sum(n for _, _, n in (*self._parts(keys, 2), *self._parts(values, 3)))

    def store(self, keys: Tensor, values: Tensor, memory: Tensor) -> None:
        """Code a block into uint8 memory of at least ``stored_bytes``."""
        for x, axis, start in self._both(keys, values):
            parts = self._cut(memory, start, x.shape, axis)
            codes, least, step = parts
            groups = x.float().unflatten(axis, (-1, _group(x.shape[axis])))
            low, high = groups.amin(axis + 1), groups.amax(axis + 1)
            least.copy_(low.clamp(-_HALF_MAX, _HALF_MAX))
            step.copy_(((high - least.float()) / self._top).clamp(0, _HALF_MAX))
            base, width = (part.float().unsqueeze(axis + 1) for part in (least, step))
            scaled = torch.where(width > 0, (groups - base) / width, 0.0)
            whole = scaled.round_().clamp_(0, self._top).to(torch.uint8).flatten(axis, axis + 1)
            codes.copy_(self._packed(whole))

    def load(self, memory: Tensor, keys: Tensor, values: Tensor) -> None:
        """Decode a block into tensors of its shapes (any strides, any floating dtype)."""
        for x, axis, start in self._both(keys, values):
            codes, least, step = self._cut(memory, start, x.shape, axis)
            whole = self._unpacked(codes).float().unflatten(axis, (-1, _group(x.shape[axis])))
            decoded = whole.mul_(step.float().unsqueeze(axis + 1))
            x.copy_(decoded.add_(least.float().unsqueeze(axis + 1)).flatten(axis, axis + 1))

    @property
    def _top(self) -> int:
        return (1 << self.bits) - 1

    def _both(self, keys: Tensor, values: Tensor) -> Iterator[tuple[Tensor, int, int]]:
        yield keys, 2, 0
        yield values, 3, sum(n for _, _, n in self._parts(keys.shape, 2))

    def _parts(self, shape: torch.Size, axis: int) -> list[tuple[torch.dtype, list[int], int]]:
        """Codes, least values and steps: dtype, shape and bytes of each."""
        per_byte = 8 // self.bits
        *outer, dim = shape
        grouped = list(shape)
        grouped[axis] //= _group(shape[axis])
        if dim % per_byte:
            raise OffloadError(
                f"kv_dtype of {self.bits} bits needs a head dimension that is a multiple of "
                f"{per_byte}; this model's is {dim}: leave kv_dtype away, or use int4"
            )
        halves = prod(grouped) * 2
        codes = [*outer, dim // per_byte]
        return [
            (torch.uint8, codes, -(-prod(codes) // 2) * 2),  # float16 follows: even
            (torch.float16, grouped, halves),
            (torch.float16, grouped, halves),
        ]

    def _cut(self, memory: Tensor, start: int, shape: torch.Size, axis: int) -> list[Tensor]:
        tensors = []
        for dtype, part, size_bytes in self._parts(shape, axis):
            piece = memory[start : start + prod(part) * dtype.itemsize]
            tensors.append(piece.view(dtype).view(part))
            start += size_bytes
        return tensors

    def _packed(self, codes: Tensor) -> Tensor:
        """[..., dim] of small numbers to [..., dim / per_byte] bytes."""
        lanes = codes.unflatten(-1, (-1, 8 // self.bits))
        packed: Tensor = lanes[..., 0].clone()
        for i in range(1, 8 // self.bits):
            packed |= lanes[..., i] << (self.bits * i)
        return packed

    def _unpacked(self, packed: Tensor) -> Tensor:
        shifts = range(0, 8, self.bits)
        return torch.stack([(packed >> s) & self._top for s in shifts], -1).flatten(-2)


def _group(size: int) -> int:
    """Elements that share a step: ``GROUP``, or all of a size that it does not divide."""
    return GROUP if size % GROUP == 0 else size
