"""What a checkpoint holds, gathered from a run: tensors by name, everything else as JSON."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.codec import encode
from offload.errors import CheckpointError
from offload.run import Runtime
from offload.stsafe import code_of

_EXTRA_STATE = "_extra_state"  # the name that nn.Module.get_extra_state has in a state_dict


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What is saved: tensors by name, and the rest as JSON."""

    weights: Mapping[str, Tensor]
    states: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    record: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (*self.weights.values(), *self.states.values(), *self.values.values())
        return sum(t.numel() * t.element_size() for t in tensors)


def gather(run: Runtime, scheduler: Any, extra: dict[str, Any] | None) -> Contents:
    """Note everything; tensors are referred to, not copied. Raises CheckpointError."""
    weights = saved_weights(run.model)
    values: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    record = {
        "torch": str(torch.__version__),
        "weights": {k: [code_of(k, t.dtype), list(t.shape)] for k, t in weights.items()},
        "extra_state": encode(_extra_state(run.model), "extra_state", values),
        "optimizer": _describe_optimizer(run, states, values) if run.optimizer else None,
        "scheduler": encode(
            None if scheduler is None else scheduler.state_dict(), "scheduler", values
        ),
        "rng": encode(_random_states(), "rng", values),
        "extra": encode(extra or {}, "extra", values),
    }
    return Contents(weights, states, values, record)


def saved_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, shared ones once."""
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {k: b for k, b in model.named_buffers() if k in kept}
    return dict(model.named_parameters()) | buffers


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules add to their state_dict by ``get_extra_state``, by the module's name."""
    found = model.state_dict(keep_vars=True).items()
    return {
        k.removesuffix(_EXTRA_STATE).removesuffix("."): v
        for k, v in found
        if k.endswith(_EXTRA_STATE)
    }


def _describe_optimizer(
    run: Runtime, states: dict[str, Tensor], values: dict[str, Tensor]
) -> dict[str, Any]:
    """The optimizer as JSON. Tensors of its state go to ``states``, state by state, so that
    neighbouring parameters' pieces of one chunk are read together."""
    optimizer = run.optimizer
    assert optimizer is not None
    names: dict[Tensor, str] = {p: k for k, p in run.model.named_parameters()}
    described: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for param, entries in optimizer.state.items():
        row = described.setdefault(_name_of(param, names), {})
        for key, value in entries.items():
            full = f"{names[param]}::{key}"
            if isinstance(value, Tensor):
                found.setdefault(key, {})[full] = value
                # Weights that live on the device come back before a checkpoint is loaded.
                resident = param in run.parts.binding.residents
                where = "cpu" if resident else value.device.type
                row[key] = {"$state": [code_of(full, value.dtype), list(value.shape), where]}
            else:
                row[key] = encode(value, full, values)
    for tensors in found.values():
        states.update(tensors)
    groups = [
        {
            "params": [_name_of(p, names) for p in group["params"]],
            "values": encode(_group_values(group), f"param_groups[{i}]", values),
        }
        for i, group in enumerate(optimizer.param_groups)
    ]
    return {
        "class": class_name(optimizer),
        "state_dtype": run.state_dtype,
        "groups": groups,
        "state": described,
    }


def _name_of(param: Tensor, names: Mapping[Tensor, str]) -> str:
    if param not in names:
        raise CheckpointError(
            f"the optimizer has a parameter of shape {tuple(param.shape)} that is not in the "
            "model: it has no name to be saved under"
        )
    return names[param]


def _group_values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def class_name(optimizer: Optimizer) -> str:
    """Module and name of the optimizer's class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }
