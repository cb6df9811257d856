"""How one tensor of optimizer state is stored in fewer bytes: bfloat16, or 8 bits a value.

`Bfloat16` rounds stochastically, so that the expected value is the exact one. Rounded to
nearest, a second moment with beta2 = 0.999 stands still: it moves by a thousandth of its value
a step, and neighbouring bfloat16 numbers are a 128th to a 256th apart.

`Blockwise`: blocks of 256 with one float32 scale, the largest magnitude of the block (Dettmers
et al., 8-bit Optimizers via Block-wise Quantization, 2022), rounded to nearest. Their codes are
finer near zero by a table; ours by a power, which costs square roots and no look-ups: a signed
value is ``scale * c * |c|`` with c = code / 127, one that cannot be negative
``scale * c ** 4`` with c = code / 255. Of the latter no code is zero, since second moments are
divided by.

[Note: rounding that nothing can disturb]
The random bits of an element are a function of the parameter's index, the state's name, the
number of the step and the element's index, so that they do not depend on budgets, cuts, timing
or threads, leave torch's generators alone, and go on after a resume. A hash for each element
took 2.1 ns, against 0.6 for the whole of a fused AdamW; so 16 bits come from a fixed permutation
of all 16-bit numbers, entered at a place that is hashed anew for each 65536 elements: each
element's bits are uniform over steps, for 0.4 ns with the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload.errors import OffloadError

BLOCK_ELEMENTS = 256
SCALE = ".scale"  # what is appended to a state's name for its scales
_TABLE_ELEMENTS = 1 << 16
_WORD = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that mirrors a parameter: one value for each ``elements`` of it."""

    dtype: torch.dtype
    elements: int = 1

    @property
    def bytes_per_element(self) -> float:
        """Bytes stored for one element of the parameter."""
        return self.dtype.itemsize / self.elements


class Codec(Protocol):
    """How one state tensor is stored. All tensors are flat; ``parts`` by suffix of the name."""

    @property
    def own(self) -> torch.dtype:
        """The optimizer's dtype."""
        ...

    @property
    def parts(self) -> Mapping[str, Part]:
        """What is stored."""
        ...

    def widen(self, stored: Sequence[Tensor]) -> Tensor:
        """A new tensor [n] of dtype ``own``. ``stored``: that range of each part."""
        ...

    def narrow(self, values: Tensor, stored: Sequence[Tensor], noise: Noise | None) -> None:
        """Store ``values`` [n]. ``noise``: None rounds to nearest."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """Random bits for elements ``start`` and on of one tensor in one step."""

    table: Tensor  # int32 [2 * _TABLE_ELEMENTS], each 16-bit number twice
    key: int
    start: int

    def runs(self, count: int) -> Iterator[tuple[int, int, Tensor]]:
        """``count`` elements in runs [a, b), with their bits, int32 [b - a] below 65536."""
        at, end = self.start, self.start + count
        while at < end:
            block = at // _TABLE_ELEMENTS
            stop = min((block + 1) * _TABLE_ELEMENTS, end)
            first = at % _TABLE_ELEMENTS + _shuffled(self.key + block) % _TABLE_ELEMENTS
            first %= _TABLE_ELEMENTS
            yield at - self.start, stop - self.start, self.table[first : first + stop - at]
            at = stop


def noise_table() -> Tensor:
    """Every 16-bit number once, shuffled by a fixed bijection, and all of it again."""
    x = torch.arange(_TABLE_ELEMENTS, dtype=torch.int64)
    for shift, factor in ((8, 0x88B5), (7, 0xDB2D), (9, 1)):
        x = (x ^ (x >> shift)) * factor & 0xFFFF
    return torch.cat([x, x]).to(torch.int32)


def _shuffled(x: int) -> int:
    """Steele, Lea and Flood's splitmix64 (2014): neighbouring numbers give unrelated ones."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
    return x ^ (x >> 31)


@dataclass(frozen=True, slots=True)
class Bfloat16:
    """The upper half of each float32."""

    own: torch.dtype

    @property
    def parts(self) -> Mapping[str, Part]:
        return {"": Part(torch.bfloat16)}

    def widen(self, stored: Sequence[Tensor]) -> Tensor:
        return stored[0].to(self.own, copy=True)

    def narrow(self, values: Tensor, stored: Sequence[Tensor], noise: Noise | None) -> None:
        values, target = values.float(), stored[0]
        if noise is None:
            target.copy_(values)
            return
        bits, halves = values.view(torch.int32), target.view(torch.int16)
        for a, b, added in noise.runs(values.numel()):
            # Towards infinity with the probability of what is cut off; infinities stay.
            halves[a:b] = torch.add(bits[a:b], added).bitwise_right_shift_(16)
        if not math.isfinite(values.sum().item()):  # a NaN may have overflowed into a number
            torch.where(values.isnan(), values.to(torch.bfloat16), target, out=target)


@dataclass(frozen=True, slots=True)
class Blockwise:
    """One byte a value and one float32 a block. A value that is not finite spoils its block."""

    own: torch.dtype
    signed: bool

    @property
    def parts(self) -> Mapping[str, Part]:
        codes = torch.int8 if self.signed else torch.uint8
        return {"": Part(codes), SCALE: Part(torch.float32, BLOCK_ELEMENTS)}

    def widen(self, stored: Sequence[Tensor]) -> Tensor:
        codes, scales = stored
        values = codes.to(torch.float32).div_(127.0 if self.signed else 255.0)
        if self.signed:
            values.mul_(values.abs())
        else:
            values.square_().square_()
        for blocks, scale in _blocks(values, scales):
            blocks.mul_(scale)
        return values.to(self.own)

    def narrow(self, values: Tensor, stored: Sequence[Tensor], noise: Noise | None) -> None:
        codes, scales = stored
        values = values.float()
        rows = zip(_blocks(values, scales), _blocks(codes, scales), strict=True)
        for (blocks, scale), (target, _) in rows:
            least, most = torch.aminmax(blocks, dim=1, keepdim=True)
            if self.signed:
                most = torch.maximum(most, least.neg_())
            elif bool((least < 0).any()):
                raise OffloadError(
                    "optimizer state that was never negative when the optimizer was tried is "
                    'negative now: state_dtype="int8" cannot hold it, use "bf16"'
                )
            scale.copy_(most)
            target.copy_(self._codes(blocks / torch.where(most == 0, 1.0, most)))

    def _codes(self, shares: Tensor) -> Tensor:
        """Codes plus a half, of values [blocks, n] in shares of their scales: to be cut off."""
        if self.signed:
            roots = shares.abs().sqrt_().mul_(127.0).add_(0.5)
            return roots.copysign_(shares)
        return shares.sqrt_().sqrt_().mul_(255.0).add_(0.5).clamp_(min=1.0)


def _blocks(flat: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole blocks [blocks, 256] with their scales [blocks, 1], then the last part of one."""
    whole = flat.numel() // BLOCK_ELEMENTS
    if whole:
        cut = whole * BLOCK_ELEMENTS
        yield flat[:cut].view(whole, BLOCK_ELEMENTS), scales[:whole].view(whole, 1)
    if flat.numel() % BLOCK_ELEMENTS:
        yield flat[whole * BLOCK_ELEMENTS :].view(1, -1), scales[whole:].view(1, 1)
