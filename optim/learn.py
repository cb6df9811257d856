"""Learn what an optimizer does and how its state is to be stored; refuse what cannot be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.errors import OffloadError
from offload.optim.codecs import SCALE, Bfloat16, Blockwise, Codec
from offload.optim.mirror import OptimizerProfile, profile
from offload.optim.narrow import COUNTER, Narrowing

STATE_DTYPES = ("bf16", "int8")


def learn(
    optimizer: Optimizer | None, state_dtype: str | None
) -> tuple[OptimizerProfile | None, Narrowing]:
    """What an optimizer does, and how its state is stored.

    Raises OffloadError for state that cannot be narrowed, and what `mirror.profile` raises.
    """
    if state_dtype is not None and state_dtype not in STATE_DTYPES:
        options = " or ".join(f'"{s}"' for s in STATE_DTYPES)
        raise OffloadError(f"state_dtype must be {options}, or None, not {state_dtype!r}")
    if optimizer is None:
        if state_dtype is not None:
            raise OffloadError("state_dtype is about optimizer state: give an optimizer")
        return None, Narrowing()
    _refuse_leftovers(optimizer)
    learnt = profile(optimizer)
    if state_dtype is None:
        return learnt, Narrowing()
    _refuse(optimizer, learnt, state_dtype)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    signed = _signed(optimizer, learnt)
    codecs = {p: _codecs(learnt, p, state_dtype, signed) for p in params}
    if not any(codecs.values()):
        raise OffloadError(
            f"{type(optimizer).__name__} keeps no state that {state_dtype} would make smaller: "
            "leave state_dtype out"
        )
    return learnt, Narrowing(state_dtype, codecs, {p: i for i, p in enumerate(params)})


def _codecs(
    learnt: OptimizerProfile, param: nn.Parameter, state_dtype: str, signed: set[str]
) -> dict[str, Codec]:
    found: dict[str, Codec] = {}
    for tensor in learnt.params[param].state:
        if not tensor.dtype.is_floating_point:
            continue
        codec: Codec = Bfloat16(tensor.dtype)
        if state_dtype == "int8":
            codec = Blockwise(tensor.dtype, tensor.name in signed)
        if codec.parts[""].dtype.itemsize < tensor.dtype.itemsize:
            found[tensor.name] = codec
    return found


def _signed(optimizer: Optimizer, learnt: OptimizerProfile) -> set[str]:
    """Names of state that is negative somewhere: when it was tried, or already."""
    found = {t.name for p in learnt.params.values() for t in p.state if not t.non_negative}
    for entries in optimizer.state.values():
        found |= {
            name
            for name, value in entries.items()
            if isinstance(value, Tensor) and not value.is_complex() and bool((value < 0).any())
        }
    return found


def _refuse(optimizer: Optimizer, learnt: OptimizerProfile, state_dtype: str) -> None:
    """Refuse optimizers whose state has no value of its own for each element."""
    kind = type(optimizer).__name__
    for param, what in learnt.params.items():
        shape = tuple(param.shape)
        odd = next((t for t in what.state if t.name not in what.element_names), None)
        if odd is not None:
            reason = f"its {odd.name} for a parameter of shape {shape} has shape {odd.shape}"
        elif not what.elementwise:
            reason = f"it does not treat the elements of a parameter of shape {shape} one by one"
        elif what.state and not param.is_contiguous():
            reason = f"a parameter of shape {shape} is not contiguous (channels last)"
        else:
            continue
        raise OffloadError(
            f'state_dtype="{state_dtype}" is for optimizers that keep a value for each element, '
            f"such as AdamW; {kind} cannot have it: {reason}. Leave state_dtype out"
        )


def _refuse_leftovers(optimizer: Optimizer) -> None:
    """Refuse narrowed state that an earlier, closed run left behind: nobody could read it right."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            entries = optimizer.state.get(param, {})
            halved = COUNTER in group and any(
                isinstance(v, Tensor) and v.dtype == torch.bfloat16 != param.dtype
                for v in entries.values()
            )
            if halved or any(name.endswith(SCALE) for name in entries):
                raise OffloadError(
                    "the optimizer's state is still as a closed run with state_dtype stored it: "
                    "end that run with unwrap(), or save and load a checkpoint"
                )
