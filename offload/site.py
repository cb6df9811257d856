"""Where the units of a model run, as far as saving and running them again must know it.

Two ways to compute share offload/activations.py and what it uses: with weights at their homes
(offload/signals.py) and in frames (offload/framed_units.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from offload.saved import Activations, Packed, Visitor


class Saving(Protocol):
    """The pair of hooks on saved tensors, and what they know of weights."""

    visit: Visitor | None  # of the unit whose forward runs

    def weight(self, tensor: Tensor) -> Packed | None:
        """What is held in place of a weight, or a part of one; None where it is none."""
        ...

    def unpack(self, packed: Packed) -> Tensor:
        """The tensor, to be used now."""
        ...


@dataclass(frozen=True, slots=True)
class Site:
    """Where units run.

    ``place``: where their activations are. ``again``: around a unit that runs again in the
    backward pass; it fetches the weights that the unit itself owns. ``foreign`` tells modules that
    run code of the user's, which a rerun would run twice. ``computing``: whether it is the model
    that runs operations, and not ourselves.
    """

    activations: Activations
    saved: Saving
    place: torch.device
    again: Callable[[nn.Module], AbstractContextManager[None]]
    foreign: Callable[[nn.Module], bool]
    computing: Callable[[], bool] = lambda: True
