"""Repeated blocks that save much, and what to ask of their run: for tests of activations."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.hooks import Hooks
from offload.run import Runtime
from offload.swap import SwapArea

ROWS = 1024


class Block(nn.Module):
    """Saves several times its input; draws random numbers, counts in a buffer (and saves it)."""

    saves_buffer = True

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.norm = nn.BatchNorm1d(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:  # [rows, width] -> [rows, width]
        assert isinstance(self.runs, Tensor)
        self.runs += 1
        h = self.up(self.norm(x) * self.scale)
        h = nn.functional.dropout(torch.nn.functional.gelu(h), 0.1 + 0.1 * random.random())
        times = self.runs if self.saves_buffer else float(self.runs)
        return x + torch.tanh(self.down(h)) * times


class Stack(nn.Module):
    """Blocks between a first and a last layer."""

    def __init__(self, blocks: int = 5) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.first = nn.Linear(16, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.last = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:  # [rows, 16] -> []
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.last(x).square().mean()
        return loss


def start() -> tuple[Stack, Optimizer]:
    """A model in training and its optimizer."""
    model = Stack()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def batch(seed: int, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: Optimizer, steps: int = 6, rows: int = ROWS) -> list[Any]:
    """Losses, and all that the steps leave behind."""
    torch.manual_seed(8)
    random.seed(8)
    losses = []
    for step in range(steps):
        loss = model(batch(step, rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return [losses, weights, random.random(), torch.rand(2)]


def stats(run: Runtime) -> dict[str, Any]:
    found: dict[str, Any] = run.stats()["activations"]
    return found


def area(run: Runtime) -> SwapArea:
    assert isinstance(run.parts.hooks, Hooks)
    found = run.parts.hooks.activations._area
    assert found is not None
    return found
