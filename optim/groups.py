"""Run an optimizer's own step over a subset of its parameters, and merge what it did to its groups.

A *shadow* is a second optimizer object of the user's class with the user's attributes, but
with its own ``param_groups`` and ``state``. Stepping shadows one after another equals one step
over everything, if the class treats each tensor for itself. Each shadow starts from the same
group values; they are merged once. A group counter (schedule-free) comes out right that way,
and an optimizer that gathers a statistic over its parameters (Prodigy) gives itself away.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from offload.errors import CoupledOptimizerError, OffloadError

# Group entries that name parameters; everything else is a value that a step may change.
_NAMING = frozenset({"params", "param_names"})
# Attributes that a shadow has for itself. `step` is where schedulers put their wrapper.
_OWN = frozenset(
    {"param_groups", "state", "step", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}
)
_MISSING = object()


def raw_step(kind: type[Optimizer]) -> Callable[..., Any]:
    """The class's step without torch's hook wrapper, so that no hook, global or not, fires."""
    step: Callable[..., Any] = kind.step
    if getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


def shadow(
    optimizer: Optimizer, groups: list[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]
) -> Optimizer:
    """An optimizer of the same class and attributes over other groups and state."""
    twin: Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    twin.param_groups = groups
    twin.state = defaultdict(dict, state)
    return twin


def same(a: object, b: object) -> bool:
    """Equality of values, bit for bit where they are tensors; NaN equals NaN."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a, b) or torch.equal(a.nan_to_num(nan=1.5), b.nan_to_num(nan=1.5))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    return bool(a == b)


def own_copy(value: Any) -> Any:
    """A value that can be changed in place without changing the original."""
    if value is None or isinstance(value, float | int):  # most are; the rest asks for longer
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | dict | set):
        return copy.deepcopy(value)
    return value


def _is_left_alone(now: Mapping[str, Any], start: Mapping[str, Any], own: frozenset[str]) -> bool:
    """Whether a step put nothing in the place of these values, and nothing beside them."""
    if len(now) != len(start) + sum(map(now.__contains__, own)):
        return False
    return all(map(operator.is_, map(now.get, start, repeat(_MISSING)), start.values()))


class GroupLedger:
    """Group values and attributes of one step: every subset starts alike, all must agree."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._start = [
            {k: own_copy(v) for k, v in group.items() if k not in _NAMING}
            for group in optimizer.param_groups
        ]
        self._attributes = {k: v for k, v in optimizer.__dict__.items() if k not in _OWN}
        self._spare: Optimizer | None = None  # a closed shadow that is as it was made
        self._merged: dict[int, dict[str, Any]] = {}
        self._changed: dict[str, Any] = {}

    def open(
        self, params: Mapping[int, list[Tensor]], state: Mapping[Tensor, dict[str, Any]]
    ) -> Optimizer:
        """A shadow over ``params`` (per index of param group), with the values of the start."""
        twin, self._spare = self._spare, None
        if twin is not None:
            for i, tensors in params.items():
                twin.param_groups[i]["params"] = tensors
            twin.state = defaultdict(dict, state)
            return twin
        groups = [
            {
                **{k: v for k, v in real.items() if k in _NAMING},
                **{k: own_copy(v) for k, v in values.items()},
                "params": params.get(i, []),
            }
            for i, (real, values) in enumerate(
                zip(self._optimizer.param_groups, self._start, strict=True)
            )
        ]
        twin = shadow(self._optimizer, groups, state)
        twin.__dict__.update(self._attributes)
        return twin

    def close(self, twin: Optimizer, touched: Iterable[int]) -> None:
        """Note what a stepped shadow did to the groups in which it had parameters.

        Its ``state`` is to be taken before: a shadow that changed nothing is opened again.
        Raises CoupledOptimizerError when an earlier subset ended with other values.
        """
        if self._is_as_opened(twin):
            for i in touched:
                twin.param_groups[i]["params"] = []
                start = self._start[i]
                self._agree(f"param_groups[{i}]", self._merged.setdefault(i, start), start)
            twin.state = defaultdict(dict)
            self._spare = twin
            return
        for i in touched:
            values = {k: v for k, v in twin.param_groups[i].items() if k not in _NAMING}
            self._agree(f"param_groups[{i}]", self._merged.setdefault(i, values), values)
        for name, value in twin.__dict__.items():
            if name in _OWN or value is self._attributes.get(name, _MISSING):
                continue
            before = self._changed.setdefault(name, value)
            self._agree("attributes", {name: before}, {name: value})

    def _is_as_opened(self, twin: Optimizer) -> bool:
        """Whether all values are the very objects of the start.

        What can be changed in place never is: each shadow has its own copy.
        """
        return (
            len(twin.param_groups) == len(self._start)
            and all(map(_is_left_alone, twin.param_groups, self._start, repeat(_NAMING)))
            and _is_left_alone(twin.__dict__, self._attributes, _OWN)
        )

    def _agree(self, where: str, first: dict[str, Any], now: dict[str, Any]) -> None:
        if first is now:
            return
        for name in first.keys() | now.keys():
            a, b = first.get(name), now.get(name)
            if a is not b and not same(a, b):
                raise coupled(
                    self._optimizer,
                    f"{where} {name!r} ends a step as {a!r} over some of the parameters and as "
                    f"{b!r} over others",
                )

    def check_unchanged(self) -> None:
        """Raise OffloadError when the groups no longer have the values that the step began with."""
        for i, (group, start) in enumerate(
            zip(self._optimizer.param_groups, self._start, strict=True)
        ):
            changed = sorted(k for k, v in start.items() if not same(group.get(k), v))
            if changed:
                raise OffloadError(
                    f"param_groups[{i}] {', '.join(changed)} changed after the update had begun in "
                    "the backward pass: change them before loss.backward(), or wrap without "
                    "step_in_backward"
                )

    def commit(self) -> None:
        """Write the agreed values into the real optimizer; tensors in place, as a step would."""
        for i, values in self._merged.items():
            self._write(self._optimizer.param_groups[i], values)
        self._optimizer.__dict__.update(self._changed)

    def commit_untouched(self, twin: Optimizer) -> None:
        """The values of groups without any gradient: what stepping them empty did."""
        for i in range(len(self._start)):
            if i not in self._merged:
                self._write(self._optimizer.param_groups[i], twin.param_groups[i])

    @staticmethod
    def _write(group: dict[str, Any], values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            old = group.get(name, _MISSING)
            if name not in _NAMING and not same(old, value):
                assign(group, name, value)


def assign(group: dict[str, Any], name: str, value: Any) -> None:
    """Set a group's value; a tensor (a learning rate that a graph refers to) in place."""
    old = group.get(name)
    if isinstance(old, Tensor) and isinstance(value, Tensor) and old.shape == value.shape:
        with torch.no_grad():
            old.copy_(value)
    else:
        group[name] = value


def coupled(optimizer: Optimizer, reason: str) -> CoupledOptimizerError:
    """The refusal of an optimizer that cannot be run chunk by chunk."""
    return CoupledOptimizerError(
        f"{type(optimizer).__name__} cannot be run chunk by chunk: {reason}. Use an optimizer "
        "that updates each parameter for itself (AdamW, SGD, Adafactor, Muon and the like)."
    )
