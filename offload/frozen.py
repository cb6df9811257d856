"""Arguments as they were: a copy of plain objects that keeps no part of the graph alive.

A unit may be given an object that it changes, such as the key-value cache of transformers, to
which each layer adds its part. To run the unit again one needs the object as it was before, but
a copy that held the cached tensors would keep what was to be dropped. So tensors inside such
objects that require gradients are not held; others (masks, positions) are.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_AS_IS = (
    int, float, complex, str, bytes, bool, type(None), type, types.FunctionType,
    types.MethodType, types.BuiltinFunctionType, types.ModuleType, nn.Module, torch.dtype,
    torch.device, torch.Size, torch.Generator, Tensor,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that others may hold; once gone, a meta tensor stands in, which no kernel takes."""

    alive: weakref.ref[Tensor]
    shape: torch.Size
    dtype: torch.dtype


@dataclass(slots=True)
class _Items:
    """A list, tuple or set."""

    kind: Callable[[Iterable[object]], object]
    items: list[object]


@dataclass(slots=True)
class _Dict:
    items: dict[object, object]


@dataclass(slots=True)
class _Object:
    """An object of the user's: its class and its attributes."""

    kind: type
    attributes: object = None


def freeze(x: object) -> object:
    """Note what an argument is now. Objects that are not of plain classes are held as they are."""
    return _freeze(x, {})


def thaw(frozen: object) -> object:
    """A new object that equals the one that was frozen."""
    return _thaw(frozen, {})


def _freeze(x: object, known: dict[int, object]) -> object:
    if isinstance(x, Tensor) and x.requires_grad:
        return _Tensor(weakref.ref(x), x.shape, x.dtype)
    if isinstance(x, _AS_IS):
        return x
    if id(x) in known:
        return known[id(x)]
    if type(x) in (list, tuple, set):
        items = known[id(x)] = _Items(type(x), [])
        items.items.extend(_freeze(y, known) for y in x)  # type: ignore[attr-defined]
        return items
    if type(x) is dict:
        entries = known[id(x)] = _Dict({})
        entries.items.update((k, _freeze(v, known)) for k, v in x.items())
        return entries
    if type(x).__new__ is object.__new__ and hasattr(x, "__dict__"):
        made = known[id(x)] = _Object(type(x))
        made.attributes = _freeze(vars(x), known)
        return made
    return x


def _thaw(x: object, known: dict[int, object]) -> object:
    if isinstance(x, _Tensor):
        there = x.alive()
        return torch.empty(x.shape, dtype=x.dtype, device="meta") if there is None else there
    if isinstance(x, _Items):
        return x.kind(_thaw(y, known) for y in x.items)
    if isinstance(x, _Dict):
        return {k: _thaw(v, known) for k, v in x.items.items()}
    if isinstance(x, _Object):
        if id(x) not in known:
            new: Any = object.__new__(x.kind)
            known[id(x)] = new
            attributes = _thaw(x.attributes, known)
            assert isinstance(attributes, dict)
            new.__dict__.update(attributes)
        return known[id(x)]
    return x
