"""Weights that live on the device, in the type that is computed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Converted:
    """Weights that live on the device, in the type that is computed in, for the pass under way.

    ``storages``: addresses of what is no activation, weights and converted ones.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.storages: set[int] = set()
        self._dtype = dtype
        self._made: dict[nn.Parameter, Tensor] = {}

    def needs(self, param: nn.Parameter) -> bool:
        """Whether this weight is computed with in another type than its own."""
        return self._dtype not in (None, param.dtype) and param.is_floating_point()

    def size_bytes(self, param: nn.Parameter) -> int:
        """Of a converted copy; 0 where none is needed."""
        if self._dtype is None or not self.needs(param):
            return 0
        return param.numel() * self._dtype.itemsize

    def of(self, param: nn.Parameter) -> Tensor:
        """The copy, one for all uses in a pass."""
        if param not in self._made:
            with ordinary_tensors():
                self._made[param] = made = param.detach().to(self._dtype)
            self.storages.add(made.untyped_storage().data_ptr())
        return self._made[param]

    def storages_of(self, param: nn.Parameter) -> tuple[int, ...]:
        """Addresses of a weight and of its copy, where there is one."""
        tensors = (param, self._made.get(param))
        return tuple(t.untyped_storage().data_ptr() for t in tensors if t is not None)

    def drop(self, param: nn.Parameter) -> None:
        """It lives here no more."""
        self.storages.difference_update(self.storages_of(param))
        self._made.pop(param, None)

    def is_made(self, param: nn.Parameter) -> bool:
        """Whether the pass under way has made its copy."""
        return param in self._made

    def clear(self) -> None:
        """Another pass begins. What autograd saved of this one stays as long as it needs it."""
        for tensor in self._made.values():
            self.storages.discard(tensor.untyped_storage().data_ptr())
        self._made.clear()


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Whatever mode the caller is in: what is made here outlives it, and is trained later."""
    with torch.inference_mode(False), torch.no_grad():
        yield
