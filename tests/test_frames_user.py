"""Weights in frames, and all that user code does with parameters between and within passes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import offload
from tests.framed import Keeper, Watched, adamw, seeded


def test_a_view_that_the_user_keeps_stays_what_it_was(tmp_path: Path) -> None:
    model = seeded(Keeper)
    watched = Watched(model, tmp_path, memory="120KiB")
    for _ in range(3):
        model(torch.ones(2, 64)).sum().backward()
    assert len({t.data_ptr() for t in model.kept}) == 3
    assert all(torch.equal(kept, model.layers[0].weight.t()) for kept in model.kept)
    arena = watched.device.engine.frames.pool
    assert arena.viewed_bytes > 0
    model.kept.clear()
    assert arena.viewed_bytes == 0
    watched.close()


def test_too_many_kept_views_are_refused(tmp_path: Path) -> None:
    model = seeded(Keeper)
    watched = Watched(model, tmp_path, memory="120KiB")
    with pytest.raises(offload.BudgetError, match="device_memory of at least"):
        _ = [model(torch.ones(2, 64)) for _ in range(20)]
    model.kept.clear()
    model(torch.ones(2, 64))
    watched.close()


@pytest.mark.parametrize("trained", [False, True])
def test_autograd_grad_and_double_backward(trained: bool, tmp_path: Path) -> None:
    """What the optimizer trains leaves beside the pass; copies are late here (adversary)."""

    def gradients(model: Any) -> list[Tensor]:
        x = torch.linspace(-1, 1, 64).expand(3, 64).clone().requires_grad_()
        params = list(model.parameters())
        first = torch.autograd.grad(model(x).square().sum(), [x, *params])
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        second = torch.autograd.grad(slope.square().sum(), params[:-1], allow_unused=True)
        return [*first, *(g for g in second if g is not None)]

    reference = gradients(seeded(Keeper))
    model = seeded(Keeper)
    optimizer = adamw(model) if trained else None
    watched = Watched(model, tmp_path, optimizer, memory="200KiB")
    for _ in range(2):
        found = gradients(watched.model)
        watched.model.kept.clear()
        assert len(found) == len(reference)
        assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    assert all(p.grad is None for p in watched.model.parameters())
    assert watched.runtime.parts.engine.ledger.other_bytes == 0
    outgoing = watched.device.outgoing
    assert outgoing is not None
    assert (outgoing.lane.meter.moved_bytes > 0) == trained
    watched.close()


def test_hooks_and_gradients_are_on_the_parameters(tmp_path: Path) -> None:
    model = seeded(Keeper)
    fired: list[nn.Parameter] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(fired.append)
    watched = Watched(model, tmp_path, optimizer=adamw(model), memory="120KiB")
    model(torch.ones(2, 64)).sum().backward()
    model.kept.clear()
    assert {id(p) for p in fired} == {id(p) for p in model.parameters()}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in fired)
    watched.close()


@pytest.mark.parametrize("how", ["data", "version", "numpy"])
def test_writes_between_passes_are_honoured(how: str, tmp_path: Path) -> None:
    def write(p: nn.Parameter) -> None:
        if how == "data":
            p.data.mul_(0.5)
        elif how == "numpy":
            p.detach().numpy()[...] *= 0.5
        else:
            with torch.no_grad():
                p.mul_(0.5)

    def run(model: Any) -> tuple[list[Tensor], str]:
        seen, raised = [], ""
        for _ in range(3):
            y = model(torch.ones(2, 64))
            write(model.layers[3].weight)
            seen.append(y.detach())
            try:
                y.sum().backward()
            except RuntimeError as error:
                raised = str(error)
        return seen + [p.grad.clone() for p in model.parameters() if p.grad is not None], raised

    reference, why = run(seeded(Keeper))
    watched = Watched(seeded(Keeper), tmp_path, memory="200KiB")
    found, raised = run(watched.model)
    watched.model.kept.clear()
    assert len(found) == len(reference)
    assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    assert (
        ("modified by an inplace operation" in raised) == ("inplace" in why) == (how == "version")
    )
    watched.close()


class Twice(nn.Module):
    """Uses a weight twice, each use keeping a view of it for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.between = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first = self.weight
        x = self.between(torch.tanh(x @ first.t()))
        return torch.tanh(x @ self.weight.t()) @ first


def test_homes_evicted_between_two_uses_make_no_second_copy(tmp_path: Path) -> None:
    model = seeded(Twice)
    expected = model(torch.ones(2, 64))
    watched = Watched(model, tmp_path, memory="200KiB")
    host = watched.runtime.parts.engine
    evicted: list[int] = []

    def evict(*_: object) -> None:
        evicted.append(len(host.moves.resident))
        host.evict(list(host.moves.resident))

    model.between.register_forward_hook(evict)
    for _ in range(3):
        y = model(torch.ones(2, 64))
        assert torch.equal(y, expected)
        y.sum().backward()
    assert min(evicted) > 0
    assert watched.doubles == 0
    watched.close()


class SelfClamping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.clamps = True

    def forward(self, x: Tensor) -> Tensor:
        if self.clamps:
            self.b.weight.data.clamp_(-0.1, 0.1)
        return torch.relu(self.b(self.a(x)))


def test_a_model_that_writes_to_its_weights_in_forward_is_refused(tmp_path: Path) -> None:
    model = seeded(SelfClamping)
    watched = Watched(model, tmp_path, memory="200KiB")
    with pytest.raises(offload.OffloadError, match=r"device copy of b.*was written to"):
        model(torch.ones(2, 64))
    model.clamps = False
    model(torch.ones(2, 64)).sum().backward()
    watched.close()


def test_replaced_data_is_used_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watched(seeded(Keeper), tmp_path, memory="200KiB")
    model, x = watched.model, torch.ones(2, 64)
    home = model.layers[1].weight.data
    model.layers[1].weight.data = torch.full((64, 64), 0.01)
    assert torch.equal(model(x), _plainly(model, x))
    assert "layers.1.weight was given other data" in capsys.readouterr().err
    model.layers[1].weight.data = home
    assert torch.equal(model(x), _plainly(model, x))
    model.bfloat16()
    y = model(x.bfloat16())
    assert torch.equal(y, _plainly(model, x.bfloat16()))
    y.sum().backward()
    assert all(p.grad.dtype is torch.bfloat16 for p in model.parameters() if p.grad is not None)
    model.kept.clear()
    watched.close()


def _plainly(model: Keeper, x: Tensor) -> Tensor:
    for layer in model.layers:
        assert isinstance(layer, nn.Linear)
        x = torch.tanh(F.linear(x, layer.weight, layer.bias))
    return x


def test_copies_and_pickles_are_plain(tmp_path: Path) -> None:
    watched = Watched(seeded(Keeper), tmp_path, memory="200KiB")
    model, x = watched.model, torch.ones(2, 64)
    expected = model(x)
    model.kept.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(type(m._parameters) is dict for m in twin.modules())
        assert torch.equal(twin(x), expected)
        assert all(p.is_leaf for p in twin.parameters())
    watched.close()
    assert all(type(m._parameters) is dict for m in model.modules())
    assert torch.equal(model(x), expected)
