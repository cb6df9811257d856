"""Putting a checkpoint's contents back: checks first, then state in its homes, then the rest."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from offload.codec import decode
from offload.contents import class_name
from offload.errors import CheckpointError
from offload.optim.groups import assign
from offload.run import Runtime
from offload.stsafe import DTYPES, Spec, code_of

_SEPARATOR = "::"


def check_weights(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError at the first weight or buffer that is not as in the checkpoint."""
    for name, tensor in now.items():
        here = f"{code_of(name, tensor.dtype)} {list(tensor.shape)}"
        if name not in saved:
            raise _mismatch(folder, f"{name} ({here} in this model) is not in it")
        code, shape = saved[name]
        if (code, shape) != (code_of(name, tensor.dtype), list(tensor.shape)):
            raise _mismatch(folder, f"{name} is {code} {shape} in it and {here} in this model")
    for name in saved:
        if name not in now:
            raise _mismatch(folder, f"it has {name}, which this model has not")


def check_scheduler(folder: Path, saved: Any, scheduler: Any) -> None:
    """Raise where a scheduler would be left unrestored; warn where one is left out."""
    if scheduler is not None and saved is None:
        raise CheckpointError(f"checkpoint {folder} holds no scheduler: load it without one")
    if scheduler is None and saved is not None:
        warnings.warn(
            f"checkpoint {folder} holds the state of a scheduler, which is not restored: "
            "give load(..., scheduler=...) to go on with it",
            stacklevel=3,
        )


class StateTargets:
    """Where optimizer state is read into, and how the optimizer gets it.

    Raises CheckpointError when the checkpoint is of another optimizer.
    """

    def __init__(self, run: Runtime, saved: Mapping[str, Any] | None, folder: Path) -> None:
        self._run = run
        self._saved = saved or {}
        self._params = dict(run.model.named_parameters())
        self._tensors: dict[str, Tensor] = {}
        if run.optimizer is not None:
            self._check(saved, folder)

    def make(self, spec: Spec) -> Tensor:
        """The tensor that will be ``optimizer.state[param][name]``: in its home, if it has one."""
        full, _, name = spec.name.rpartition(_SEPARATOR)
        code, shape, where = self._saved["state"][full][name]["$state"]
        param = self._params[full]
        home = self._run.parts.binding.homes.get(param)
        target = home.state(name, tuple(shape), DTYPES[code]) if home and shape else None
        if target is None:
            # As the optimizer would have made it: strides like the parameter's.
            device = param.device if where == param.device.type else torch.device(where)
            like = torch.empty_like(param, dtype=DTYPES[code], device=device, requires_grad=False)
            same = tuple(shape) == tuple(param.shape)
            target = like if same else torch.empty(shape, dtype=DTYPES[code], device=device)
        self._tensors[spec.name] = target
        return target

    def bind(self, values: Mapping[str, Tensor]) -> None:
        """Give the optimizer its state and its groups' values."""
        optimizer = self._run.optimizer
        if optimizer is None:
            return
        optimizer.state.clear()
        for full, entries in self._saved["state"].items():
            optimizer.state[self._params[full]] = {
                name: self._tensors[f"{full}{_SEPARATOR}{name}"]
                if isinstance(value, dict) and "$state" in value
                else decode(value, values)
                for name, value in entries.items()
            }
        for group, saved in zip(optimizer.param_groups, self._saved["groups"], strict=True):
            for name, value in decode(saved["values"], values).items():
                assign(group, name, value)

    def _check(self, saved: Mapping[str, Any] | None, folder: Path) -> None:
        optimizer = self._run.optimizer
        assert optimizer is not None
        if saved is None:
            raise _mismatch(folder, "it was saved without an optimizer")
        if saved["class"] != class_name(optimizer):
            raise _mismatch(
                folder, f"it was saved with {saved['class']}, this is {class_name(optimizer)}"
            )
        if saved.get("state_dtype") != self._run.state_dtype:
            raise _mismatch(
                folder,
                f"its state_dtype is {saved.get('state_dtype')!r}, not {self._run.state_dtype!r}",
            )
        names = {p: k for k, p in self._params.items()}
        here = [[names.get(p) for p in group["params"]] for group in optimizer.param_groups]
        there = [group["params"] for group in saved["groups"]]
        if len(here) != len(there):
            raise _mismatch(folder, f"it has {len(there)} parameter groups, not {len(here)}")
        for i, (mine, others) in enumerate(zip(here, there, strict=True)):
            for name in dict.fromkeys([*mine, *others]):
                if (name in mine) != (name in others):
                    who = "this optimizer's" if name in mine else "the checkpoint's"
                    raise _mismatch(folder, f"{name} is only in {who} parameter group {i}")


def restore_modules(model: nn.Module, saved: Any, values: Mapping[str, Tensor]) -> None:
    """Hand back what ``get_extra_state`` gave."""
    for name, value in decode(saved, values).items():
        model.get_submodule(name).set_extra_state(value)


def restore_random(states: Mapping[str, Any]) -> None:
    """The random states of torch, CUDA (where there are as many devices), Python and numpy."""
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])


def _mismatch(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {folder} does not fit this run: {what}; load it into the same model and "
        "optimizer that it was saved from"
    )
