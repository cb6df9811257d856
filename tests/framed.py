"""A wrapped model in frames, for the tests: too small an arena and host, poison, late copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import offload
from offload.config import Tuning
from offload.device_side import Device
from offload.tiers.frames import Frame
from offload.tiers.spec import Machine

MACHINE = Machine(2e9, 2e9, 1e9, 1e9, 8e9, 8e9)


def tuning(seed: int | None = 5, **changes: Any) -> Tuning:
    values: dict[str, Any] = {
        "chunk_bytes": 16384, "device_chunk_bytes": 24 * 1024, "machine": MACHINE,
        "poison": True, "adversary": seed, "residents": False,
    }  # fmt: skip
    return Tuning(**(values | changes))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().train()


class Watched:
    """A wrapped model, and where its chunks went."""

    def __init__(
        self, model: Any, folder: Path | None, optimizer: torch.optim.Optimizer | None = None,
        memory: str = "420KiB", host: str = "500KiB", how: Tuning | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        options = {"device": "emulated", "device_memory": memory} | options
        offload.wrap(
            model, optimizer, host_memory=host, disk=folder, tuning=how or tuning(), **options
        )
        self.model = model
        self.optimizer = optimizer
        self.runtime = offload.runtime(model)
        self.doubles = 0  # uploads of a chunk of which an older copy was still in use
        self.places: defaultdict[int, list[int]] = defaultdict(list)
        arena, assign = self.device.engine.frames.pool, self.device.engine.frames.pool.assign

        def note(frame: Frame, owner: int) -> None:
            self.places[owner].append(frame.address)
            self.doubles += owner in (arena.owner_at(f.address) for f in arena.waiting)
            assign(frame, owner)

        arena.assign = note  # type: ignore[method-assign]

    @property
    def device(self) -> Device:
        device = self.runtime.parts.device
        assert device is not None
        return device

    def check_tiers(self) -> None:
        """All three tiers took part: chunks moved between frames, within budgets, from disk."""
        again = [addresses for addresses in self.places.values() if len(addresses) > 1]
        assert len(again) > len(self.places) // 2
        # A frame that was freed may be mapped anew at the same address, so not every chunk moves.
        assert any(len(set(addresses)) > 1 for addresses in again)
        assert self.doubles == 0
        host, device = self.runtime.parts.engine, self.device.engine
        for ledger in (host.ledger, device.ledger):
            assert ledger.peak_bytes <= ledger.budget_bytes
        weights = sum(c.size_bytes for c in device.space.chunks)
        assert device.ledger.peak_bytes - device.ledger.peak_other_bytes < weights
        assert host.counters.demand_loads + host.counters.planned_loads > 20

    def close(self) -> None:
        self.runtime.close()
        arena = self.device.engine.frames.pool
        assert arena.total_bytes == arena.viewed_bytes


class Keeper(nn.Module):
    """Keeps a view of a weight from inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.layers[0]
        self.kept.append(first.weight.detach().t())
        for layer in self.layers:
            out: Tensor = layer(x)
            x = torch.tanh(out)
        return x
