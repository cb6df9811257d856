"""Accumulation in vertical order: the plain loop's bits, one micro-batch's weight traffic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from offload.errors import BudgetError, OffloadError
from offload.prefetch.trace import Phase
from offload.run import Runtime
from offload.steps import Kind
from offload.tiers.spec import KIB, MIB
from tests.conftest import ZOO, adamw, copied

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

Batch = dict[str, Tensor]


def batches(name: str, count: int, seed: int = 1) -> list[Batch]:
    """Micro-batches for a model of the zoo."""
    generator = torch.Generator().manual_seed(seed)
    return [ZOO[name].batch(generator) for _ in range(count)]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """A Hugging Face model's own loss."""
    loss: Tensor = model(**batch).loss / 3
    return loss


def plain_loop(
    model: nn.Module, micro_batches: list[Any], loss_fn: Callable[..., Tensor]
) -> list[Tensor]:
    """What ``accumulate`` must equal."""
    losses = []
    for batch in micro_batches:
        loss = loss_fn(model, batch)
        loss.backward()
        losses.append(loss.detach())
    return losses


def trained(
    model: nn.Module,
    accumulate: Callable[[list[Batch], Any], list[Tensor]],
    name: str,
    count: int,
    steps: int = 4,
) -> list[Any]:
    """Losses and gradients of some steps, and the weights at their end."""
    optimizer, seen = adamw(list(model.parameters())), []
    if "_offload" in model.__dict__:
        optimizer = model.__dict__["_offload"].runtime.optimizer
    for step in range(steps):
        losses = accumulate(batches(name, count, step), loss_of)
        seen.append(copied([losses, [p.grad for p in model.parameters()]]))
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, copied(model.state_dict())]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("offload-micro-batch")]


def accumulates_vertically(run: Runtime) -> bool:
    """Not declined, and weights did move."""
    return not run._accumulator._declined and run.parts.engine.counters.evictions > 10


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_bits_are_those_of_the_plain_loop(
    manage: Manager, zoo: Zoo, name: str, checkpointing: str, count: int
) -> None:
    plain = zoo.build(name, checkpointing)
    wanted = trained(plain, lambda b, f: plain_loop(plain, b, f), name, count)
    model = zoo.build(name, checkpointing)
    run = manage(model, adamw(list(model.parameters())), host_bytes=(800 + 260 * count) * KIB)
    assert zoo.same(wanted, trained(model, run.accumulate, name, count))
    assert accumulates_vertically(run)
    assert run.parts.engine.ledger.other_bytes == 0


@pytest.mark.parametrize("name", ["mixtral", "t5", "gpt2"])
def test_other_models_and_an_adversarial_disk(manage: Manager, zoo: Zoo, name: str) -> None:
    def quiet() -> nn.Module:
        model = zoo.build(name)
        module: Any
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        return model

    plain = quiet()
    wanted = trained(plain, lambda b, f: plain_loop(plain, b, f), name, 3)
    model = quiet()
    run = manage(model, adamw(list(model.parameters())), host_bytes=1700 * KIB, adversary=5)
    assert zoo.same(wanted, trained(model, run.accumulate, name, 3))
    assert accumulates_vertically(run)


class Skipping(nn.Module):
    """Layers of which each batch uses some, in its own order, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(6))

    def forward(self, x: Tensor, order: list[int]) -> Tensor:
        for i in order:
            x = torch.tanh(self.layers[i](x))
        return x


def test_micro_batches_of_different_shapes_and_paths(manage: Manager, zoo: Zoo) -> None:
    orders = [[0, 1, 2, 3], [0, 3, 5], [5, 4, 3, 3, 2, 1, 0], [2], [0, 1, 2, 3, 4, 5]]
    micro = [(torch.randn(2 + i, 96), order) for i, order in enumerate(orders)]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        loss: Tensor = model(*batch).square().mean()
        return loss

    def live(model: nn.Module, accumulate: Any, optimizer: Any) -> list[Any]:
        seen = []
        for _ in range(3):
            losses = accumulate(micro, loss_fn)
            seen.append(copied([losses, [p.grad for p in model.parameters()]]))
            optimizer.step()
            optimizer.zero_grad()
        return seen

    plain = Skipping()
    wanted = live(plain, lambda b, f: plain_loop(plain, b, f), adamw(list(plain.parameters())))
    model = Skipping()
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=300 * KIB)
    assert zoo.same(wanted, live(model, run.accumulate, optimizer))
    assert accumulates_vertically(run)


def deep() -> nn.Module:
    """Twelve layers whose weights are far larger than their activations."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(128, 128), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(128, 8))


def rows(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches for ``deep``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, 128, generator=generator), torch.randint(0, 8, (2,), generator=generator))
        for _ in range(count)
    ]


def fit(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def visits(manage: Manager, count: int, accumulate: bool) -> int:
    """How often the passes of a step turn to other weights: each time may be a read."""
    model = deep()
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=1 * MIB)
    for step in range(4):
        if accumulate:
            run.accumulate(rows(count, step), fit)
        else:
            plain_loop(model, rows(count, step), fit)
        optimizer.step()
        optimizer.zero_grad()
    trace = run.parts.steps.tracks[Kind.TRAIN].trace
    weights = {c for h in run.parts.binding.homes.values() for c in h.weight_chunks}
    run.close()
    assert trace is not None
    passes = [m for m in trace.moments if m.phase is not Phase.UPDATE]
    asked = [tuple(n.chunk for n in m.needs if n.chunk in weights) for m in passes]
    asked = [chunks for chunks in asked if chunks]
    return 1 + sum(a != b for a, b in pairwise(asked))


def test_eight_micro_batches_visit_weights_as_one_does(manage: Manager) -> None:
    """Bytes follow, but also from what else the planner does with the time: bench/accumulate.py."""
    one = visits(manage, 1, accumulate=False)
    assert visits(manage, 8, accumulate=True) <= 1.1 * one
    assert visits(manage, 8, accumulate=False) > 6 * one


class UserError(Exception):
    """What user code raises."""


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_an_error_in_one_micro_batch_ends_all(
    manage: Manager, zoo: Zoo, error: type[BaseException], where: str
) -> None:
    def failing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        layer: Any = model.get_submodule("10")
        if batch[0] is micro[2][0] and where == "forward":
            handle = layer.register_forward_pre_hook(fail)
        loss = fit(model, batch)
        if batch[0] is micro[2][0] and where == "backward":
            loss.register_hook(fail)
        elif where == "forward" and batch[0] is micro[2][0]:
            handle.remove()
        return loss

    def fail(*_: object) -> None:
        raise error

    plain, model = deep(), deep()
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=1 * MIB)
    for step in range(3):
        micro = rows(4, step)
        with pytest.raises(error):
            run.accumulate(micro, failing)
        model.get_submodule("10")._forward_pre_hooks.popitem() if where == "forward" else None
        optimizer.zero_grad()
        assert run.parts.engine.ledger.other_bytes == 0
        losses = run.accumulate(rows(4, step), fit)
        assert zoo.same(plain_loop(plain, rows(4, step), fit), losses)
        grads = [p.grad for p in model.parameters()]
        assert zoo.same([p.grad for p in plain.parameters()], grads)
        optimizer.zero_grad()
        plain.zero_grad()
    assert accumulates_vertically(run)


def test_dropout_is_run_as_the_plain_loop(
    manage: Manager, zoo: Zoo, capfd: pytest.CaptureFixture[str]
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(deep(), nn.Dropout(0.3), nn.BatchNorm1d(8))

    def live(model: nn.Module, accumulate: Any) -> list[Any]:
        torch.manual_seed(8)
        seen = []
        for step in range(3):
            losses = accumulate(rows(3, step), fit)
            seen.append(copied([losses, [p.grad for p in model.parameters()]]))
            model.zero_grad()
        return [*seen, copied(model.state_dict()), torch.rand(1)]

    plain, model = build(), build()
    run = manage(model, adamw(list(model.parameters())), host_bytes=1 * MIB)
    wanted = live(plain, lambda b, f: plain_loop(plain, b, f))
    assert zoo.same(wanted, live(model, run.accumulate))
    assert capfd.readouterr().err.count("draws random numbers") == 1


class Twice(nn.Module):
    """A layer used in two reentrant checkpoints, whose gradient is added in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = deep()

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = x.requires_grad_()
        for _ in range(2):
            x = checkpoint(self.layers[:24], x, use_reentrant=True)
        out: Tensor = self.layers[24](x)
        return out


def test_a_weight_in_two_reentrant_checkpoints_is_run_as_the_plain_loop(
    manage: Manager, zoo: Zoo
) -> None:
    plain, model = Twice(), Twice()
    run = manage(model, adamw(list(model.parameters())), host_bytes=1 * MIB)
    assert zoo.same(plain_loop(plain, rows(3), fit), run.accumulate(rows(3), fit))
    grads = [p.grad for p in model.parameters()]
    assert zoo.same([p.grad for p in plain.parameters()], grads)
    assert run._accumulator._declined


def test_autocast_of_the_caller_holds(manage: Manager, zoo: Zoo) -> None:
    plain, model = deep(), deep()
    run = manage(model, adamw(list(model.parameters())), host_bytes=1600 * KIB)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        wanted = plain_loop(plain, rows(3), fit)
        assert zoo.same(wanted, run.accumulate(rows(3), fit))


def test_activations_that_do_not_fit_are_refused(manage: Manager) -> None:
    model = deep()
    run = manage(model, adamw(list(model.parameters())), host_bytes=1 * MIB)
    before = copied(model.state_dict())
    large = [(torch.randn(900, 128), torch.zeros(900, dtype=torch.long))] * 8
    with pytest.raises(BudgetError, match="activation"):
        run.accumulate(large, fit)
    assert run.parts.engine.ledger.other_bytes == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    run.accumulate(rows(3), fit)


@pytest.mark.parametrize("size", [30, 80])  # too much for the backward pass; for the forward pass
def test_activations_that_fit_one_at_a_time_are_run_as_the_plain_loop(
    manage: Manager, zoo: Zoo, capfd: pytest.CaptureFixture[str], size: int
) -> None:
    def live(model: nn.Module, accumulate: Any, optimizer: Any) -> list[Any]:
        seen = []
        for _ in range(3):
            losses = accumulate(many, fit)
            seen.append(copied([losses, [p.grad for p in model.parameters()]]))
            optimizer.step()
            optimizer.zero_grad()
        return seen

    many = [(torch.randn(size, 128), torch.zeros(size, dtype=torch.long)) for _ in range(8)]
    plain, model = deep(), deep()
    wanted = live(plain, lambda b, f: plain_loop(plain, b, f), adamw(list(plain.parameters())))
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=1 * MIB)
    assert zoo.same(wanted, live(model, run.accumulate, optimizer))
    assert capfd.readouterr().err.count("of 8 micro-batches") == 1
    assert run.parts.engine.ledger.other_bytes == 0


def test_a_closed_run_says_so(manage: Manager) -> None:
    model = deep()
    run = manage(model, host_bytes=1 * MIB)
    run.close()
    with pytest.raises(OffloadError, match="closed"):
        run.accumulate(rows(2), fit)
