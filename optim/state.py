"""What the update needs from whoever keeps the bytes, and where optimizer state lives.

The engine implements `Store`; `StateHomes` keeps ``optimizer.state[p][name]`` bound to the
engine's home tensors, whoever replaced them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.errors import OffloadError
from offload.optim.mixed import Mixed
from offload.optim.narrow import Kept, Narrowing


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Elements ``start`` to ``stop`` of one parameter, flattened in its contiguous order.

    A parameter is one segment, or several (in several groups) when its optimizer works element
    by element; then each ``start`` is a multiple of 16 elements and of 64 bytes.
    """

    param: nn.Parameter
    start: int
    stop: int


@dataclass(frozen=True, slots=True, eq=False)
class UpdateGroup:
    """Segments that are made resident, updated and released together."""

    index: int
    segments: tuple[Segment, ...]


class Store(Protocol):
    """The owner of weights, gradients and optimizer state, as the update sees it."""

    @property
    def mixed(self) -> Mixed | None:
        """Gradients, or copies of the weights, in another dtype. None: ``.grad``, no copies."""
        ...

    def groups(self) -> Sequence[UpdateGroup]:
        """Every parameter of the optimizer, each element once, in the order of the update."""
        ...

    def enter(self, group: UpdateGroup) -> None:
        """Return when weights, gradients and state of the group's segments are resident."""
        ...

    def leave(self, group: UpdateGroup) -> None:
        """The group's weights and state have been modified; also called after an error."""
        ...

    def home_of_state(
        self, param: nn.Parameter, name: str, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor | None:
        """The full-size contiguous home of ``optimizer.state[param][name]``.

        The same storage each call. None: not managed, the state stays an ordinary tensor.
        """
        ...


class StateHomes:
    """The binding ``optimizer.state[p][name] is home``, kept against outside replacement."""

    def __init__(self, optimizer: Optimizer, store: Store, narrowing: Narrowing) -> None:
        self.narrowing = narrowing
        self._optimizer = optimizer
        self._store = store
        # What this class last put there: a home, or the plain tensor of an unmanaged entry.
        self._bound: dict[Tensor, dict[str, Tensor]] = {}

    def adopt(self) -> None:
        """Copy state that is not in its home (loaded, or older than us) into it, and bind it."""
        for param, entries in self._optimizer.state.items():
            if not isinstance(param, nn.Parameter) or param.dim() == 0:
                continue
            bound = self._bound.get(param, {})
            stored = {n for k in self.narrowing.kept(param, entries, 0).values() for n in k.parts}
            for name, value in list(entries.items()):
                if not isinstance(value, Tensor) or value.dim() == 0 or bound.get(name) is value:
                    continue
                if name in self.narrowing.of(param) and name not in stored:
                    entries |= self.narrowed(param, name, value)
                elif entries[name] is value:  # not a scale that was just made
                    entries[name] = self.place(param, name, value)

    def place(self, param: nn.Parameter, name: str, value: Tensor) -> Tensor:
        """The tensor that now holds a whole ``value``: its home, or itself where unmanaged."""
        if param.dim() == 0 or value.dim() == 0:
            return value
        home = self._store.home_of_state(param, name, value.shape, value.dtype)
        if home is None:
            home = value.detach().contiguous()
        elif home.data_ptr() != value.data_ptr():
            with torch.no_grad():
                home.copy_(value)
        self._bound.setdefault(param, {})[name] = home
        return home

    def narrowed(self, param: nn.Parameter, name: str, value: Tensor) -> Mapping[str, Tensor]:
        """The homes that now hold a whole ``value``, narrowed to the nearest."""
        if not value.is_floating_point() or value.shape != param.shape:
            raise OffloadError(
                f"{name} of a parameter of shape {tuple(param.shape)} is {value.dtype} of shape "
                f"{tuple(value.shape)}: it cannot be stored as state_dtype="
                f'"{self.narrowing.state_dtype}"'
            )
        kept = self.reserve_narrow(param, name, 0)
        kept.narrow(value, 0, nearest=True)
        return kept.parts

    def reserve_narrow(self, param: nn.Parameter, name: str, step: int) -> Kept:
        """The homes of narrowed state that will be filled slice by slice."""
        parts = {}
        for suffix, part in self.narrowing.of(param)[name].parts.items():
            whole = part.elements == 1
            shape = param.shape if whole else torch.Size([-(-param.numel() // part.elements)])
            parts[name + suffix] = self.reserve(param, name + suffix, part.dtype, shape)
        return self.narrowing.keep(param, name, parts, step)

    def reserve(
        self, param: nn.Parameter, name: str, dtype: torch.dtype, shape: torch.Size | None = None
    ) -> Tensor:
        """The home of state (per element unless ``shape``) that will be filled slice by slice."""
        shape = param.shape if shape is None else shape
        home = self._store.home_of_state(param, name, shape, dtype)
        if home is None:
            home = torch.empty(shape, dtype=dtype, device=param.device)
        self._bound.setdefault(param, {})[name] = home
        return home
