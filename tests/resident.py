"""A wrapped model with weights that live on the device, and a loop, for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload.device_side import Device
from tests.framed import tuning


class Run:
    """A wrapped model with residents, and what its device holds."""

    def __init__(
        self, model: Any, folder: Path | None, memory: str, optimizer: Any = None,
        host: str = "1MiB", **options: Any,
    ) -> None:  # fmt: skip
        how = tuning(residents=True)
        given: dict[str, Any] = {"device": "emulated", "device_memory": memory, "host_memory": host}
        offload.wrap(model, optimizer, disk=folder, tuning=how, **(given | options))
        self.runtime = offload.runtime(model)
        device = self.runtime.parts.device
        assert device is not None
        self.device: Device = device

    @property
    def resident_bytes(self) -> int:
        found: int = self.runtime.stats()["tiers"]["device"]["resident_bytes"]
        return found

    def uploaded(self) -> int:
        found: int = self.runtime.stats()["device"]["uploaded_bytes"]
        return found

    def check_budgets(self) -> None:
        for ledger in (self.runtime.parts.engine.ledger, self.device.engine.ledger):
            assert ledger.peak_bytes <= ledger.budget_bytes


def mlp(layers: int = 8, width: int = 128) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def loss_of(model: nn.Module, seed: int, rows: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    loss: Tensor = model(torch.randn(rows, 128, generator=generator)).square().mean()
    return loss


def train(model: nn.Module, optimizer: Any, steps: range, rows: int = 8, clip: bool = False) -> Any:
    losses = []
    for seed in steps:
        loss = loss_of(model, seed, rows)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
