"""A hook that does not survive copying: copies and pickles of a hooked model are plain models."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import nn


def inert(*_: object) -> None:
    """What a hook becomes in a copy."""


class Hook:
    """A callable that does not survive copying: copies do nothing."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _make_inert, ()


def _make_inert() -> Callable[..., None]:
    return inert


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The hooks of one module, in torch's own dicts: there is no public way to list them."""
    return (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
        module._backward_pre_hooks,
    )  # fmt: skip


def has_user_hooks(model: nn.Module) -> bool:
    """Whether code of the user's runs within passes: hooks on modules or parameters."""
    # Asked in every pass, and most of them are empty.
    of_modules = [hooks for m in model.modules() for hooks in hooks_of(m) if hooks]
    of_params = [
        hooks
        for p in model.parameters()
        for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
        if hooks
    ]
    return any(
        not isinstance(hook, Hook)
        for hooks in chain(of_modules, of_params)
        for hook in hooks.values()
    )
