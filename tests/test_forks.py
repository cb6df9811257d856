"""A loop that takes another way through its model while the engine still learns its times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from offload.steps import Kind
from offload.track import RETIMED_AFTER
from tests.conftest import Manager

STEPS = RETIMED_AFTER[-1] + 4


class Exits(nn.Module):
    """Layers of which the last ones may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(8))
        self.used = 8

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[: self.used]:
            x = torch.tanh(layer(x))
        return x


def built() -> tuple[Exits, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Exits()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def losses(model: Exits, optimizer: torch.optim.Optimizer, turn: int) -> list[float]:
    """Fewer layers from step ``turn`` on."""
    found = []
    for step in range(STEPS):
        model.used = 8 if step < turn else 4
        loss = model(torch.full((4, 96), 0.1 * (step + 1))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("turn", range(2, RETIMED_AFTER[-1] + 2))
def test_a_loop_may_take_another_way_at_any_step(manage: Manager, turn: int) -> None:
    model, optimizer = built()
    run = manage(model, optimizer, host_bytes=160_000)
    assert losses(model, optimizer, turn) == losses(*built(), turn)
    track = run.parts.steps.tracks[Kind.TRAIN]
    assert run.parts.engine.counters.evictions
    assert track.trace is not None
    used = {n.chunk for m in track.trace.moments for n in m.needs}
    assert len(used) < len(run.parts.engine.space.chunks)  # of the way that is taken now
