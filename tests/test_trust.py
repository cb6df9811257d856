"""P3 beside the engine's own transfers: what user code writes while a chunk is on its way home."""

from __future__ import annotations

import pytest
import torch

from offload.prefetch.trace import Phase
from offload.tiers.home import Chunk
from tests.conftest import Manager, build_mlp


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.BACKWARD])
def test_a_write_beside_the_chunks_own_write_is_honoured(
    manage: Manager, monkeypatch: pytest.MonkeyPatch, phase: Phase
) -> None:
    model = build_mlp()
    run = manage(model)
    engine = run.parts.engine
    engine.moves.trust.phase = phase
    weight = next(model.parameters())
    chunk = engine.space.chunks[run.parts.binding.homes[weight].weight_chunks[0]]
    writes = [torch.ones(())]
    finish = engine.space.finish_save

    def late(leaving: Chunk) -> None:
        finish(leaving)
        if leaving is chunk and writes:
            weight.data.add_(writes.pop())  # a hook of the user's, before its pages go

    monkeypatch.setattr(engine.space, "finish_save", late)
    with torch.no_grad():
        weight.add_(1.0)  # or it would not have to be written
    want = weight.detach() + 1.0
    engine.evict_all()
    assert not writes, "it was not written home: nothing is proved"
    assert torch.equal(weight.detach(), want)
