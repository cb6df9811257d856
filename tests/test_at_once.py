"""Where everything fits, a fused optimizer makes its own step, and what it wrote is not lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.config import Tuning
from offload.prefetch.trace import Phase
from offload.steps import Kind
from offload.tiers.home import Backing
from tests.small import small_mlp

Made = tuple[nn.Module, torch.optim.Optimizer]
ROOM, STEPS = "64MiB", 8


def made(**options: Any) -> Made:
    torch.manual_seed(0)
    model = small_mlp()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    width = next(model.parameters()).shape[1]
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(at))
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [t for p in model.parameters() for t in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*model.parameters(), *state)]


def managed(folder: Path, **options: Any) -> tuple[Made, Any]:
    model, optimizer = made(**options)
    offload.wrap(
        model, optimizer, host_memory=ROOM, disk=folder, tuning=Tuning(chunk_bytes=1 << 16)
    )
    return (model, optimizer), offload.runtime(model)


def calls_of(run: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each tensor that torch's own kernel is called with."""
    calls: list[int] = []
    real = torch.optim.AdamW._init_group

    def noting(self: Any, group: Any, params: list[Tensor], *rest: Any) -> Any:
        found = real(self, group, params, *rest)
        calls.append(len(params))
        return found

    monkeypatch.setattr(torch.optim.AdamW, "_init_group", noting)
    return calls


def test_a_fused_step_is_one_call_and_what_it_wrote_survives_eviction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, (own, run) = made(fused=True), managed(tmp_path, fused=True)
    for at in range(STEPS):
        step(*plain, at)
        step(*own, at)
    assert run.parts.steps.tracks[Kind.TRAIN].fits
    run.parts.engine.evict_all()  # all is clean on the disk now
    assert not any(c.dirty for c in run.parts.engine.space.chunks)
    calls = calls_of(run, monkeypatch)
    step(*own, STEPS)
    assert calls == [len(list(own[0].parameters()))]
    touched = {c for h in run.parts.binding.homes.values() for c in h.weight_chunks}
    chunks = [run.parts.engine.space.chunks[c] for c in touched]
    assert all(c.dirty and c.backing is Backing.RAM for c in chunks)
    step(*plain, STEPS)
    run.parts.engine.evict_all()
    assert all(map(torch.equal, values(*own), values(*plain)))
    run.close()


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}], ids=str)
def test_one_that_makes_temporaries_is_stepped_in_pieces(
    options: dict[str, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, (own, run) = made(**options), managed(tmp_path, **options)
    for at in range(STEPS):
        step(*plain, at)
        step(*own, at)
    assert run.parts.steps.tracks[Kind.TRAIN].fits
    calls = calls_of(run, monkeypatch)
    step(*own, STEPS)
    assert len(calls) > 1
    step(*plain, STEPS)
    assert all(map(torch.equal, values(*own), values(*plain)))
    run.close()


def test_state_that_was_taken_away_is_made_in_its_home(tmp_path: Path) -> None:
    plain, (own, run) = made(fused=True), managed(tmp_path, fused=True)
    for at in range(STEPS):
        step(*plain, at)
        step(*own, at)
    for _, optimizer in (plain, own):
        optimizer.state.clear()
    step(*plain, 0)
    step(*own, 0)
    homes = run.parts.binding.homes
    for param in own[0].parameters():
        average = own[1].state[param]["exp_avg"]
        assert (
            average.data_ptr()
            == homes[param].state("exp_avg", average.shape, average.dtype).data_ptr()
        )
    assert all(map(torch.equal, values(*own), values(*plain)))
    run.close()


def test_a_closure_is_called_once_and_its_gradients_are_stepped(tmp_path: Path) -> None:
    plain, (own, run) = made(fused=True), managed(tmp_path, fused=True)
    calls = []

    def closed(model: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
        def closure() -> Tensor:
            calls.append(at)
            optimizer.zero_grad()
            width = next(model.parameters()).shape[1]
            x = torch.randn(4, width, generator=torch.Generator().manual_seed(at))
            loss: Tensor = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]

    for at in range(STEPS):
        closed(*plain, at)
        closed(*own, at)
    assert len(calls) == 2 * STEPS
    assert all(map(torch.equal, values(*own), values(*plain)))
    run.close()


def test_times_are_of_steps_after_the_first_ones(tmp_path: Path) -> None:
    """The first two pay for what torch prepares: hooks stay on until later ones were timed."""
    own, run = managed(tmp_path, fused=True)
    track = run.parts.steps.tracks[Kind.TRAIN]
    fits = []
    for at in range(6):
        step(*own, at)
        fits.append(track.fits)
    assert fits == [False, False, False, False, True, True]
    assert {m.phase for m in track.trace.moments} >= {Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE}
    run.close()


def test_a_forecast_is_of_steps_without_hooks(tmp_path: Path) -> None:
    own, run = managed(tmp_path, fused=True)
    track = run.parts.steps.tracks[Kind.TRAIN]
    for at in range(5):
        step(*own, at)
    assert track.fits
    assert len(track.bare_s) == 1
    for at in range(3):
        step(*own, at)
    assert run.plan.forecast.step_s == pytest.approx(sorted(track.bare_s)[1])
    run.close()
