"""Saved activations kept, run again or swapped: the same bits, within the budget, nothing left."""

from __future__ import annotations

import copy
import gc
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import offload
import offload.visit
from offload.activations import find_units
from offload.errors import BudgetError, OffloadError, SpillError
from offload.hooks import Hooks
from offload.run import Runtime
from offload.steps import Kind
from offload.swap import SwapArea

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

FAMILIES = ["gpt2", "llama", "llama-tied", "t5", "vit", "mixtral"]
MIB = 1 << 20
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


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """What an unwrapped run gives."""
    return train(*start())


@pytest.fixture
def small_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models: swap tiny tensors too."""
    monkeypatch.setattr(offload.visit, "LEAST_BYTES", 256)


# -- bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("setting", ["recompute", "swap"])
@pytest.mark.usefixtures("small_swaps")
def test_families(zoo: Zoo, manage: Manager, name: str, setting: str) -> None:
    expected = zoo.train(name, *started(zoo, name), steps=4)
    model, optimizer = started(zoo, name)
    run = manage(model, optimizer, activations=setting, adversary=3)
    assert zoo.same(zoo.train(name, model, optimizer, steps=4), expected)
    # Mixtral's layers carry hooks of transformers', which are not to run twice: swapped instead.
    way = "swap" if name == "mixtral" else setting
    assert set(stats(run)["ways"]) == {way}
    assert (stats(run)["swapped_bytes"] > 100_000) == (way == "swap")


def started(zoo: Zoo, name: str, checkpointing: str = "off") -> tuple[nn.Module, Optimizer]:
    model = zoo.build(name, checkpointing)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("setting", ["auto", "recompute", "swap"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.usefixtures("small_swaps")
def test_users_own_checkpointing(
    zoo: Zoo, manage: Manager, setting: str, checkpointing: str
) -> None:
    expected = zoo.train("llama", *started(zoo, "llama"), steps=3)
    model, optimizer = started(zoo, "llama", checkpointing)
    run = manage(model, optimizer, activations=setting)
    assert zoo.same(zoo.train("llama", model, optimizer, steps=3), expected)
    assert stats(run)["saved_bytes"] == [0, 0, 0], "those units are the user's"
    assert stats(run)["swapped_bytes"] == 0


@pytest.mark.parametrize("setting", ["auto", "keep", "recompute", "swap"])
@pytest.mark.parametrize("seed", [None, 5])
def test_random_numbers_and_buffers(
    zoo: Zoo, manage: Manager, plain: list[Any], setting: str, seed: int | None
) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, activations=setting, adversary=seed)
    assert zoo.same(train(model, optimizer), plain)
    assert set(stats(run)["ways"]) == ({setting} if setting in ("recompute", "swap") else
                                       {"keep"} if setting == "auto" else set())  # fmt: skip


def test_the_cache_of_transformers_does_not_grow_twice(zoo: Zoo, manage: Manager) -> None:
    model, optimizer = started(zoo, "llama")
    manage(model, optimizer, activations="recompute")
    x = torch.randint(0, 192, (2, 12))
    out: Any = model(input_ids=x, labels=x, use_cache=True)
    out.loss.backward()
    assert out.past_key_values.get_seq_length() == 12


# -- budgets ----------------------------------------------------------------------------------


def peak_bytes(manage: Manager, setting: str) -> int:
    model, optimizer = start()
    run = manage(model, optimizer, activations=setting)
    train(model, optimizer, steps=2)
    return run.parts.engine.ledger.peak_other_bytes


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("share", [0.45, 0.7])
def test_auto_fits_where_keeping_does_not(
    zoo: Zoo, manage: Manager, plain: list[Any], share: float, disk: bool
) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, disk=disk)
    train(model, optimizer, steps=2)
    ledger = run.parts.engine.ledger
    budget = ledger.fixed_bytes + int(share * ledger.peak_other_bytes) + disk * 500_000
    model, optimizer = start()
    manage(model, optimizer, host_bytes=budget, disk=disk)
    with pytest.raises(BudgetError, match="host_memory of at least"):
        train(model, optimizer)
    model, optimizer = start()
    run = manage(model, optimizer, host_bytes=budget, disk=disk, activations="auto")
    assert zoo.same(train(model, optimizer), plain)
    ways = stats(run)["ways"]
    assert set(ways) != {"keep"}, ways
    assert run.parts.engine.ledger.peak_bytes <= budget
    assert run.parts.steps.tracks[Kind.TRAIN].trace is not None


def test_less_memory_than_keeping(manage: Manager) -> None:
    assert peak_bytes(manage, "recompute") < 0.5 * peak_bytes(manage, "keep")


def test_swapping_waits_for_room(zoo: Zoo, manage: Manager, plain: list[Any]) -> None:
    model, optimizer = start()
    budget = 3 * peak_bytes(manage, "keep") // 4
    run = manage(model, optimizer, host_bytes=budget, activations="swap", adversary=2)
    assert zoo.same(train(model, optimizer), plain)
    assert run.parts.engine.ledger.peak_bytes <= budget


def test_a_larger_input_than_planned(zoo: Zoo, manage: Manager) -> None:
    expected = [train(m, o, 3) + train(m, o, 3, 2 * ROWS) for m, o in [start()]]
    model, optimizer = start()
    manage(model, optimizer, host_bytes=16 * MIB, activations="auto")
    assert zoo.same([train(model, optimizer, 3) + train(model, optimizer, 3, 2 * ROWS)], expected)


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
    activations._in_flight.clear()
    found = activations.activations._area
    while found is not None and found.relieve():
        pass
    return run.parts.engine.ledger.other_bytes, found.used_bytes if found is not None else 0


def test_bytes_that_come_back_wrong_are_an_error(
    manage: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, activations="swap")
    loss = model(batch(0))
    while area(run).relieve():
        pass
    disk = area(run).disk
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


# -- the face ---------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    model, optimizer = start()
    with pytest.raises(OffloadError, match="give one of auto, keep, recompute, swap"):
        offload.wrap(model, optimizer, activations="discard")
    with pytest.raises(OffloadError, match="needs a disk"):
        offload.wrap(model, optimizer, activations="swap")
    with pytest.raises(OffloadError, match="not offered yet"):
        offload.wrap(
            model, optimizer, activations="recompute", device="emulated", device_memory="64MiB",
            host_memory="64MiB", disk=tmp_path,
        )  # fmt: skip


def test_units_are_the_outermost_repeated_blocks(zoo: Zoo) -> None:
    assert list(find_units(Stack(3))) == ["blocks.0", "blocks.1", "blocks.2"]
    t5 = zoo.build("t5")
    assert [n for n in find_units(t5) if n.startswith("enc")] == [
        "encoder.block.0", "encoder.block.1"
    ]  # fmt: skip
    assert find_units(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {}
