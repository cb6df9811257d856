"""Results of single operations kept for reruns: the same bits, and those operations run once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import offload.activations
from offload.activations import Planned
from offload.prefetch.policy import Choice, Way
from offload.results import repeats
from tests.blocks import ROWS, Block, Stack, batch, start, stats, train

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

MIB = 1 << 20
NAMES = (
    "aten.native_batch_norm.default 0", "aten.addmm.default 0", "aten.gelu.default 0",
    "aten.addmm.default 1", "aten.mm.default 0",
)  # fmt: skip


@pytest.fixture
def keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "recompute" keeps the results of these operations."""
    choice = Choice(Way.RECOMPUTE, parts=NAMES)
    monkeypatch.setattr(offload.activations, "RECOMPUTE", choice)
    monkeypatch.setattr(Planned, "keeps_parts", True)


class Count(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def backward_calls(model: nn.Module) -> Counter[str]:
    """Operations of a backward pass."""
    loss = model(batch(1))
    with Count() as count:
        loss.backward()
    calls: Counter[str] = count.calls
    return calls


@pytest.mark.usefixtures("keeping")
def test_the_same_bits(zoo: Zoo, manage: Manager) -> None:
    expected = train(*start())
    model, optimizer = start()
    run = manage(model, optimizer, activations="recompute", adversary=3)
    assert zoo.same(train(model, optimizer), expected)
    assert set(stats(run)["kept_results"]) == {len(NAMES)}
    assert run.parts.engine.ledger.other_bytes < MIB, "nothing is left"


def test_what_is_kept_does_not_run_again(manage: Manager, request: pytest.FixtureRequest) -> None:
    model, optimizer = start()
    manage(model, optimizer, activations="recompute")
    without = backward_calls(model)
    request.getfixturevalue("keeping")
    model, optimizer = start()
    manage(model, optimizer, activations="recompute")
    kept = backward_calls(model)
    assert without["aten.addmm.default"] == 10
    assert kept["aten.addmm.default"] == 0
    assert kept["aten.gelu.default"] == 0
    assert kept["aten.bernoulli_.float"] == 5, "what draws random numbers runs again"


def test_only_what_repeats_is_left_out() -> None:
    x = torch.zeros(1, 1, 2, 2)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert repeats(attention, (x, x, x), (x, x))
    assert repeats(attention, (x, x, x, 0.0), (x, x))
    assert not repeats(attention, (x, x, x, 0.1), (x, x))
    assert not repeats(torch.ops.aten.native_dropout.default, (x, 0.1, True), (x, x))
    on_cuda = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert repeats(on_cuda, (x, x, x), (x, x, None, None, 4, 4, x, x, x))  # lengths among them
    assert repeats(torch.ops.aten.mm.default, (x, x), x)
    assert not repeats(torch.ops.aten._local_scalar_dense.default, (x,), 1.0)


class Leaks(Block):
    """Shows a product to others, who may write to it: no node has saved it."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shown = self.widen(x.view(2, -1, 64))  # by aten.mm, and a view that is none
        self.shown = shown.detach()
        return x + torch.tanh(2 * shown).view(-1, 64)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.usefixtures("keeping")
def test_a_result_that_was_written_to_is_made_again(manage: Manager, *, writes: bool) -> None:
    def build() -> tuple[Stack, torch.optim.Optimizer]:
        model = Stack()
        torch.manual_seed(6)
        model.blocks = nn.ModuleList(Leaks() for _ in range(3))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def gradients(model: Stack) -> tuple[list[Tensor], int]:
        loss = model(batch(1))
        for block in model.blocks:
            assert isinstance(block, Leaks)
            if writes:
                block.shown.add_(1)
        with Count() as count:
            loss.backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found, count.calls["aten.mm.default"]

    expected, plain_products = gradients(build()[0])
    model, optimizer = build()
    manage(model, optimizer, activations="recompute")
    found, products = gradients(model)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert products - plain_products == 3 * writes


@pytest.mark.usefixtures("keeping")
def test_written_to_within_the_forward(zoo: Zoo, manage: Manager) -> None:
    class InPlace(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x).add_(1)  # writes to aten.addmm's result
            return x + torch.tanh(self.down(h))

    def build() -> tuple[Stack, torch.optim.Optimizer]:
        model = Stack()
        torch.manual_seed(6)
        model.blocks = nn.ModuleList(InPlace() for _ in range(3))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    expected = train(*build(), steps=3)
    model, optimizer = build()
    manage(model, optimizer, activations="recompute")
    assert zoo.same(train(model, optimizer, steps=3), expected)


@pytest.mark.parametrize("handling_s", [0.0, 1.0])
def test_auto_measures_reruns(
    zoo: Zoo, manage: Manager, monkeypatch: pytest.MonkeyPatch, handling_s: float
) -> None:
    """Without what measuring took: a second for each operation is more than all took."""
    monkeypatch.setattr("offload.rerun.handling_s", lambda: handling_s)
    expected = train(*start(), rows=4 * ROWS)
    model, optimizer = start()
    run = manage(model, optimizer, activations="auto", disk=False, host_bytes=48 * MIB)
    assert zoo.same(train(model, optimizer, rows=4 * ROWS), expected)
    assert isinstance(run.parts.hooks, offload.hooks.Hooks)
    seen = run.parts.hooks.activations._chooser.profile.seen
    again = [s for s in seen if s.rerun_s is not None]
    assert any("addmm" in p.name for s in again for p in s.parts)
    for s in again:
        assert (s.rerun_s == 0.0) == (handling_s > 0)
        assert s.handling_s >= handling_s * len(s.parts)
