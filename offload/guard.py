"""Foresee what an operation will allocate, in the warm-up step, and refuse before it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offload.internals import TorchDispatchMode, tree_leaves, tree_map


class AllocationGuard(TorchDispatchMode):
    """Before each operation of a recorded forward pass, says how many bytes it will allocate.

    ``foresee(size_bytes, operation)`` may evict chunks, or raise BudgetError while the tensor
    that would exceed the budget does not exist yet. Sizes come from running the operation on
    the meta device; operations without a meta kernel (data-dependent shapes) pass unseen and
    are counted when autograd saves their result.
    """

    def __init__(self, foresee: Callable[[int, str], None], running: Callable[[], bool]) -> None:
        super().__init__()
        self._running = running
        self._foresee = foresee
        self._known: dict[object, int] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        size_bytes = self._size_of_result(func, args, kwargs)
        if size_bytes and self._running():
            self._foresee(size_bytes, str(func))
        return func(*args, **kwargs)

    def _size_of_result(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if not allocates(func):
            return 0
        key = _signature(func, args, kwargs)
        if key not in self._known:
            self._known[key] = _on_meta(func, args, kwargs)
        return self._known[key]


def allocates(func: Any) -> bool:
    """Whether an operation makes tensors; views and in-place operations do not."""
    returns = func._schema.returns
    return bool(returns) and any(r.alias_info is None for r in returns)


def _signature(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
    def plain(x: object) -> object:
        return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else str(x)

    return func, tuple(plain(x) for x in tree_leaves((args, kwargs)))


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return sum(t.numel() * t.element_size() for t in results_on_meta(func, args, kwargs))


def results_on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The operation's results as meta tensors; empty where that cannot be told beforehand."""

    def to_meta(x: object) -> object:
        if isinstance(x, Tensor):
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return torch.device("meta") if isinstance(x, torch.device) else x

    meta_args, meta_kwargs = tree_map(to_meta, (args, kwargs))
    if "device" in meta_kwargs or not any(isinstance(x, Tensor) for x in tree_leaves(args)):
        meta_kwargs["device"] = torch.device("meta")
    try:
        result = func(*meta_args, **meta_kwargs)
    except Exception:  # no meta kernel, a shape that depends on data, no device argument
        return []
    return [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.device.type == "meta"]
