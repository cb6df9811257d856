"""A small model, and a backward pass, for the tests of whole runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def backward(loss: Tensor, **options: Any) -> None:
    """``loss.backward`` with a type."""
    loss.backward(**options)


def small_mlp() -> nn.Module:
    """Three layers, of which one spans two chunks."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)
    )
