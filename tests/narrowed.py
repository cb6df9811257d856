"""Managed runs of one small model whose optimizer state is stored in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import offload
from offload.config import Tuning
from offload.run import Runtime
from offload.tiers.spec import MIB, Machine

MACHINE = Machine(1.8e9, 5.5e9, 1.4e9, 1.4e9, 1e10)
WIDTH, DEPTH = 320, 4
KINDS = ("bf16", "int8")


class Runs:
    """Starts managed runs of one small model, and closes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[Runtime] = []

    def __call__(
        self,
        state_dtype: str | None,
        host_bytes: int = 4 * MIB,
        chunk_bytes: int = MIB,
        optimizer: Optimizer | None = None,
        model: nn.Module | None = None,
        step_in_backward: bool = False,
        **tuning: Any,
    ) -> Runtime:
        torch.manual_seed(0)
        model = model or nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
        optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        options: dict[str, Any] = {"machine": MACHINE, "poison": True, "keep_hooks": True} | tuning
        offload.wrap(
            model, optimizer, host_memory=host_bytes, disk=self._folder, state_dtype=state_dtype,
            step_in_backward=step_in_backward, tuning=Tuning(chunk_bytes=chunk_bytes, **options),
        )  # fmt: skip
        self._open.append(offload.runtime(model))
        return self._open[-1]

    def close(self) -> None:
        for run in self._open:
            if "_offload" in run.model.__dict__:
                run.close()


def train(run: Runtime, first: int, last: int) -> None:
    assert run.optimizer is not None
    for step in range(first, last):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        run.model(x).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


def everything(run: Runtime) -> dict[str, Tensor]:
    """Weights and stored state, copied."""
    assert run.optimizer is not None
    found = {k: v.clone() for k, v in run.model.state_dict().items()}
    for i, entries in enumerate(run.optimizer.state.values()):
        found |= {f"{i}.{k}": v.clone() for k, v in entries.items()}
    return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
