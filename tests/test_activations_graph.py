"""Activations run again or swapped, under odd uses of autograd and cut short; nothing is left."""

from __future__ import annotations

import copy
import gc
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.errors import OffloadError, SpillError
from offload.hooks import Hooks
from offload.run import Runtime
from offload.swap_disk import DiskRoute
from tests.blocks import Block, Stack, area, batch, start, train

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

MIB = 1 << 20


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """What an unwrapped run gives."""
    return train(*start())


# -- ordinary autograd ------------------------------------------------------------------------


def gradients(model: Stack, how: str) -> list[Any]:
    """Gradients by an odd way of asking for them."""
    torch.manual_seed(9)
    random.seed(9)
    params = list(model.parameters())
    if how == "twice":
        loss = model(batch(1))
        loss.backward(retain_graph=True)
        loss.backward()
    elif how == "grad":
        return [g.clone() for g in torch.autograd.grad(model(batch(1)), params)]
    elif how == "second order":
        made = torch.autograd.grad(model(batch(1)), params, create_graph=True)
        torch.stack([g.square().sum() for g in made]).sum().backward()
    elif how == "two passes":
        for block in model.blocks:  # plain PyTorch would refuse, too
            assert isinstance(block, Block)
            block.saves_buffer = False
        (model(batch(1)) + model(batch(2))).backward()
    return [p.grad.clone() for p in params if p.grad is not None]


@pytest.mark.parametrize("how", ["twice", "grad", "second order", "two passes"])
@pytest.mark.parametrize("setting", ["recompute", "swap"])
def test_odd_ways_to_ask(zoo: Zoo, manage: Manager, setting: str, how: str) -> None:
    model, _ = start()
    expected = gradients(model, how)
    model, optimizer = start()
    manage(model, optimizer, activations=setting)
    assert zoo.same(gradients(model, how), expected)


@pytest.mark.parametrize("setting", ["recompute", "swap"])
def test_weights_written_to_before_backward(manage: Manager, setting: str) -> None:
    model, optimizer = start()
    manage(model, optimizer, activations=setting)
    loss = model(batch(1))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Writes(Block):
    """Writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(super().forward(x.clone()))


def test_units_that_write_to_their_input(zoo: Zoo, manage: Manager) -> None:
    def build() -> tuple[Stack, Optimizer]:
        model = Stack()
        torch.manual_seed(6)
        model.blocks = nn.ModuleList(Writes() for _ in range(4))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    expected = train(*build(), steps=3)
    model, optimizer = build()
    manage(model, optimizer, activations="auto", host_bytes=14 * MIB)
    assert zoo.same(train(model, optimizer, steps=3), expected)
    model, optimizer = build()
    manage(model, optimizer, activations="recompute")
    with pytest.raises(OffloadError, match=r"blocks\.0 writes to a tensor that it was given"):
        train(model, optimizer)


class Strays(Block):
    """Saves something else the second time."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * torch.exp(x[: self.calls]).mean()


def test_a_rerun_that_differs_is_an_error(manage: Manager) -> None:
    model = Stack()
    model.blocks = nn.ModuleList(Strays() for _ in range(2))
    manage(model, torch.optim.AdamW(model.parameters()), activations="recompute")
    loss = model(batch(1))
    with pytest.raises(OffloadError, match=r"blocks\.1: its forward pass, run again"):
        loss.backward()


@pytest.mark.parametrize("setting", ["recompute", "swap"])
def test_users_hooks_run_once(manage: Manager, setting: str) -> None:
    model, optimizer = start()
    ran = []
    block = model.blocks[1]
    assert isinstance(block, Block)
    block.up.register_forward_hook(lambda *_: ran.append(1))
    manage(model, optimizer, activations=setting)
    model(batch(1)).backward()
    assert len(ran) == 1


# -- nothing is left --------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["recompute", "swap"])
@pytest.mark.parametrize("where", ["forward", "backward", "dropped"])
def test_a_step_that_is_cut_short(
    zoo: Zoo, manage: Manager, plain: list[Any], setting: str, where: str
) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, activations=setting)
    whole_pass(model, optimizer)  # whatever is made once is there
    memory_bytes, disk_bytes = held(run)
    for _ in range(3):
        cut_short(model, where)
    # A graph that failed is let go of by torch when the next one is run.
    whole_pass(model, optimizer)
    assert held(run)[0] == memory_bytes
    assert held(run)[1] <= 2 * disk_bytes
    for buffer, value in zip(model.buffers(), Stack().buffers(), strict=True):
        buffer.copy_(value)
    assert zoo.same(train(model, optimizer), plain)
    assert held(run)[0] == memory_bytes


def whole_pass(model: Stack, optimizer: Optimizer) -> None:
    model(batch(0)).backward()
    optimizer.zero_grad()


def cut_short(model: Stack, where: str) -> None:
    def fail(*_: object) -> None:
        raise KeyError("cut")

    if where == "dropped":
        model(batch(0))
        return
    if where == "forward":
        handle = model.blocks[3].register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(batch(0))
        handle.remove()
        return
    loss = model(batch(0))
    handle = next(model.blocks[2].parameters()).register_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    handle.remove()


def held(run: Runtime) -> tuple[int, int]:
    """Memory that is not chunks, and bytes of the disk, once all is at rest."""
    gc.collect()  # an exception's frames hold the graph
    activations = run.parts.hooks
    assert isinstance(activations, Hooks)
    activations._grads.nothing_in_flight()
    found = activations.activations._area
    while found is not None and found.relieve():
        pass
    return run.parts.engine.ledger.other_bytes, found.route.disk_bytes if found is not None else 0


def test_bytes_that_come_back_wrong_are_an_error(
    manage: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, activations="swap")
    loss = model(batch(0))
    while area(run).relieve():
        pass
    route = area(run).route
    assert isinstance(route, DiskRoute)
    disk = route.store.disk
    true_read = disk.read
    monkeypatch.setattr(disk, "read", lambda *where: true_read(*where) ^ 1)
    with pytest.raises(SpillError, match="not what was written"):
        loss.backward()


def test_backward_after_closing_says_so(manage: Manager) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, activations="swap")
    loss = model(batch(0))
    while area(run).relieve():
        pass
    run.close()
    with pytest.raises(OffloadError, match="after the run was closed"):
        loss.backward()


def test_unwrapped_and_copied_models_are_plain(zoo: Zoo, manage: Manager) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, activations="recompute")
    train(model, optimizer, steps=1)
    twin = copy.deepcopy(model)
    run.unwrap()
    assert not model.blocks[0]._forward_pre_hooks
    torch.manual_seed(1)
    random.seed(1)
    expected = model(batch(0))
    torch.manual_seed(1)
    random.seed(1)
    assert zoo.same(twin(batch(0)), expected)


def test_accumulation_is_then_the_plain_loop(
    zoo: Zoo, manage: Manager, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[list[Tensor]] = []
    for _ in range(2):
        model, optimizer = start()
        run = manage(model, optimizer, activations="recompute")
        torch.manual_seed(9)
        random.seed(9)
        if found:
            run.accumulate([batch(1), batch(2)], lambda m, x: m(x))
        else:
            for seed in (1, 2):
                model(batch(seed)).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert zoo.same(found[1], found[0])
    assert 'activations="recompute" is for one pass at a time' in capsys.readouterr().err
