"""Moving parameters into their homes, and out again as plain tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from offload.bind import Binding, Home, tensor_at
from offload.engine import Engine
from offload.errors import OffloadError
from offload.prefetch.trace import Access, Need, Phase
from offload.tiers.home import Backing, Region


def adopt_parameter(engine: Engine, home: Home) -> None:
    """Copy one parameter into its home, chunk by chunk, and point it there."""
    param = home.param
    target = tensor_at(home.family.weights, home.index, param)
    copy_into(engine, home.family.weights, home.index, target, param.detach())
    param.data = target


def check_parameters(model: nn.Module, binding: Binding) -> None:
    """Before a forward pass: refuse other Parameters, and say which data is not ours any more.

    Raises OffloadError naming a Parameter that was not wrapped (``load_state_dict(assign=True)``).
    A plain tensor in its place (``functional_call``) and replaced ``.data`` (a swap with averaged
    weights) are the user's, and are used as they are; what they hold is outside the budget.
    """
    for name, param in model.named_parameters():
        home = binding.homes.get(param)
        if (home is None and not isinstance(param, nn.Parameter)) or param in binding.residents:
            continue
        if home is None:
            raise OffloadError(
                f"{name} is not the Parameter that was wrapped (load_state_dict(assign=True) or an "
                "assignment replaced it); load with assign=False, or close the runtime and wrap "
                "again"
            )
        if param.data_ptr() != home.address and param.numel() and home.name not in binding.away:
            binding.away.add(home.name)
            print(
                f"offload: {name} was given other data than its home; it is used as it is, "
                "outside the budget",
                file=sys.stderr,
            )


def copy_into(engine: Engine, region: Region, tensor: int, target: Tensor, source: Tensor) -> None:
    """Copy source [any shape] over a homed tensor of the same shape, one chunk at a time."""
    _copy(engine, region, tensor, target, source, partial(_overwrite, engine))


def copy_out(engine: Engine, region: Region, tensor: int, source: Tensor, target: Tensor) -> None:
    """Copy a homed tensor to one of the same shape that is elsewhere, one chunk at a time."""
    _copy(engine, region, tensor, target, source, lambda c: Need(c, Access.READ))


def _copy(
    engine: Engine, region: Region, tensor: int, target: Tensor, source: Tensor,
    need: Callable[[int], Need],
) -> None:  # fmt: skip
    ids = region.chunks_of(tensor)
    if len(ids) <= 1 or not (target.is_contiguous() and source.is_contiguous()):
        engine.need(Phase.FORWARD, tuple(need(c) for c in ids))
        target.copy_(source)
        return
    start = region.layout.starts[tensor]
    to, of = target.view(-1), source.reshape(-1)
    for c in ids:
        lo, hi = region.layout.chunk_range(c - region.chunk_ids.start)
        a, b = max(lo - start, 0), min(hi - start, target.numel())
        engine.need(Phase.FORWARD, (need(c),))
        to[a:b].copy_(of[a:b])


def _overwrite(engine: Engine, chunk: int) -> Need:
    """A chunk that nothing was put in yet needs no reading; one shared with a neighbour does."""
    void = engine.space.chunks[chunk].backing is Backing.VOID
    return Need(chunk, Access.FRESH if void else Access.WRITE)


def release_all(binding: Binding) -> None:
    """Give every parameter and gradient plain memory again. The whole model must fit."""
    for home in binding.homes.values():
        home.param.data = home.param.detach().clone(memory_format=torch.preserve_format)
        if home.grad_is_home:
            assert home.param.grad is not None
            home.param.grad = home.param.grad.clone(memory_format=torch.preserve_format)
