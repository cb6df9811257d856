"""Gradients in, and copies of the weights out, in another dtype than the weights': piece by piece.

The plain sequence converts every gradient, steps, and copies every weight: each of the three
sweeps over memory. Here a piece's gradient is converted just before the piece is stepped and its
copy is made just after, while both are in the cache; the converted gradients of the whole never
exist. torch 2.13 has no optimizer kernel that takes gradients of another dtype, so the
conversion is a call of its own. Same bits as the plain sequence: every operation is elementwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from offload.tiers.spec import round_up

_ALIGN_BYTES = 64  # as torch's allocator gives them


class Mixed(Protocol):
    """Where an update finds its gradients, and whom it tells of new weights."""

    def gradient(self, param: nn.Parameter) -> Tensor | None:
        """The gradient, of the parameter's shape and any dtype; None: it is not stepped."""
        ...

    def stepped(self, param: nn.Parameter, start: int, values: Tensor) -> None:
        """Elements from ``start`` on have these new ``values``, still in the cache.

        ``values``: flat or, where it is all of the parameter, of its shape. Each element once a
        step. An error raised here ends the step half done.
        """
        ...


@dataclass(frozen=True, slots=True)
class MixedTensors:
    """Gradients and copies as ordinary tensors; parameters that are not named use ``.grad``.

    ``gradients`` stay as they are, and are the caller's to replace. ``copies`` are contiguous
    tensors of the parameters' shapes and any floating dtype.
    """

    gradients: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)
    copies: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise ValueError for a copy that cannot be written piece by piece."""
        for param, copy in self.copies.items():
            if copy.shape != param.shape or not copy.is_contiguous():
                raise ValueError(
                    f"the copy of a parameter of shape {tuple(param.shape)} has shape "
                    f"{tuple(copy.shape)} and strides {copy.stride()}: give a contiguous tensor "
                    "of the same shape"
                )

    def gradient(self, param: nn.Parameter) -> Tensor | None:
        return self.gradients.get(param, param.grad)

    def stepped(self, param: nn.Parameter, start: int, values: Tensor) -> None:
        copy = self.copies.get(param)
        if copy is None:
            return
        if values.shape != copy.shape:
            copy = copy.view(-1)[start : start + values.numel()]
        copy.copy_(values)


class Workspace:
    """Memory for the converted gradients of one call of the optimizer, the same at each call.

    Made when first needed, for ``pieces`` pieces of ``piece_elements`` float32. What does not fit
    in gets memory of its own.
    """

    def __init__(self, piece_elements: int, pieces: int) -> None:
        self.piece_elements = piece_elements
        self._size_bytes = pieces * piece_elements * torch.float32.itemsize
        self._buffer: Tensor | None = None
        self._used_bytes = 0

    def clear(self) -> None:
        """The tensors handed out are not used any more."""
        self._used_bytes = 0

    def convert(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """A flat gradient [n] as ``dtype``, in memory that is valid until `clear`."""
        start = self._used_bytes
        stop = start + grad.numel() * dtype.itemsize
        if stop > self._size_bytes or not grad.is_cpu:
            return grad.to(dtype)
        if self._buffer is None:
            self._buffer = torch.empty(self._size_bytes, dtype=torch.uint8)
        self._used_bytes = round_up(stop, _ALIGN_BYTES)
        return self._buffer[start:stop].view(dtype).copy_(grad)
