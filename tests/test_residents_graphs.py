"""Weights that live on the device while graphs of autograd use them: they stay until those end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.device_hooks import deliver_here
from offload.errors import BudgetError
from offload.residents import Residents
from offload.use import Use
from tests.framed import adamw
from tests.resident import Run, loss_of, mlp, same, train, weights

DTYPES = [None, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_graph_leads_to_stays(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Its gradient comes where the weight was, and its memory is not free."""
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer, compute_dtype=dtype)
    train(model, optimizer, range(3))
    residents, give_up = run.device.residents, run.device.engine.give_up
    assert residents is not None
    assert residents.complete
    loss = loss_of(model, 3)
    assert not give_up()
    loss.backward()
    del loss
    assert residents.complete
    assert give_up()
    assert not residents.complete
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, range(4, 6))
    plain = Run(twin := mlp(), tmp_path / "twin", "64MiB", other := adamw(twin),
                compute_dtype=dtype)  # fmt: skip
    train(twin, other, range(6))
    assert same(weights(model), weights(twin))
    for each in (run, plain):
        each.runtime.close()


def test_a_graph_of_an_earlier_step_holds_nothing(tmp_path: Path) -> None:
    """Users keep losses."""
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer)
    train(model, optimizer, range(3))
    loss = loss_of(model, 3)
    loss.backward()
    assert not run.device.engine.give_up()
    optimizer.step()
    assert run.device.engine.give_up()
    run.runtime.close()


def test_frozen_weights_that_autograd_has_saved_stay(tmp_path: Path) -> None:
    """They lead to no gradient, but their memory is not free."""
    model = mlp()
    frozen = list(model[4].parameters())
    for param in frozen:
        param.requires_grad_(False)
    optimizer = adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer)
    train(model, optimizer, range(3))
    residents = run.device.residents
    assert residents is not None
    assert residents.complete
    loss = loss_of(model, 3)
    while run.device.engine.give_up():
        pass
    assert residents.has(frozen[0])
    loss.backward()
    del loss
    while run.device.engine.give_up():
        pass
    assert not residents.chunks
    run.runtime.close()


def test_a_pass_without_gradients_has_what_it_began_with(tmp_path: Path) -> None:
    """Weights that were used may go home amid it, but that which was read last."""
    plain, model = mlp(), mlp()
    run = Run(model, tmp_path, "64MiB")
    x, left = torch.randn(4, 128), list[int]()

    def give_up(module: nn.Module, *_: object) -> None:
        while run.device.engine.give_up():
            pass
        assert run.device.residents is not None
        left.append(len(run.device.residents.chunks))

    with torch.no_grad():
        for _ in range(3):
            model(x)
        assert run.resident_bytes > 0
        model[3].register_forward_hook(give_up)
        assert torch.equal(model(x), plain(x))
    assert left == [1]
    run.runtime.close()


def test_a_gradient_is_delivered_where_the_weight_was_read() -> None:
    """``meta`` in the device's place: a graph refuses gradients of another device."""
    param = nn.Parameter(torch.ones(3, device="meta"))
    view, at_home = param.detach().to(torch.bfloat16), nn.Parameter(torch.ones(3))
    used = Use.apply(param, view, lambda _, grad: deliver_here(at_home, grad), None)
    used.sum().backward()
    assert param.grad is not None
    assert (param.grad.device.type, param.grad.dtype) == ("meta", torch.float32)


def headed() -> nn.Sequential:
    """What needs most is made when all weights have been used."""
    return nn.Sequential(*mlp(6), nn.Linear(128, 1024), nn.Tanh())


def test_room_for_a_larger_input_is_made_before_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = headed(), headed()
    reference, optimizer = adamw(plain), adamw(model)
    run = Run(model, tmp_path, "5MiB", optimizer)
    losses = train(model, optimizer, range(3))
    residents = run.device.residents
    assert residents is not None
    assert residents.complete
    held, send = list[int](), Residents._send_home

    def noted(self: Residents, chunks: list[int]) -> None:
        held.append(run.device.engine.ledger.other_bytes)
        send(self, chunks)

    monkeypatch.setattr(Residents, "_send_home", noted)
    losses += train(model, optimizer, range(3, 6), rows=256)
    assert held
    assert not any(held)
    assert residents.chunks
    wanted = train(plain, reference, range(3)) + train(plain, reference, range(3, 6), rows=256)
    assert losses == wanted
    assert same(weights(model), weights(plain))
    run.check_budgets()
    run.runtime.close()


def test_what_could_not_go_home_is_said_and_goes_before_the_next_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = headed(), headed()
    reference, optimizer = adamw(plain), adamw(model)
    run = Run(model, tmp_path, "5MiB", optimizer)
    train(model, optimizer, range(3))
    before: Any = run.device.residents
    monkeypatch.setattr(type(before), "leave_room", lambda *_: True)  # nothing was foreseen
    with pytest.raises(BudgetError, match="go home before the next one"):
        loss_of(model, 3, rows=256)
    losses = train(model, optimizer, range(3, 6), rows=256)
    train(plain, reference, range(3))
    assert losses == train(plain, reference, range(3, 6), rows=256)
    assert same(weights(model), weights(plain))
    run.check_budgets()
    run.runtime.close()
