"""The chunked step gives the bits of the plain step, for every optimizer and way to call it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from offload.errors import OffloadError
from offload.optim.mirror import profile
from offload.optim.step import ChunkedStep, Clip
from tests.stepped import (
    CUT,
    OPTIMIZERS,
    PIECE,
    SHAPES,
    SPECIAL,
    NotHere,
    O,
    assert_at_home,
    assert_same,
    fill_grads,
    install,
    make_params,
    pair,
    step_both,
)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_bits_as_plain(name: str) -> None:
    plain, chunked, a, b = pair(OPTIMIZERS[name], SPECIAL.get(name, SHAPES))
    _, store = install(chunked)
    for step in range(5):
        skip = 1 if step == 2 else None
        fill_grads(a, step, skip)
        fill_grads(b, step, skip)
        versions = [p._version for p in b]
        plain.step()
        chunked.step()
        assert_same(plain, chunked)
        for i, (p, version) in enumerate(zip(b, versions, strict=True)):
            assert p._version > version or i == skip
    if name != "sgd":
        assert_at_home(chunked, store)
    spread = [g.index for g in store.groups() for s in g.segments if s.param is b[0]]
    assert len(spread) == (3 if name in CUT else 1)
    assert store.entered == list(range(len(store.groups())))


def test_bfloat16_weights() -> None:
    a, b = ([nn.Parameter(p.detach().bfloat16()) for p in make_params()] for _ in range(2))
    plain, chunked = O.AdamW(a, fused=True), O.AdamW(b, fused=True)
    install(chunked)
    for step in range(3):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn_like(p) * (step + 1)
            q.grad = p.grad.clone()
        plain.step()
        chunked.step()
    assert_same(plain, chunked)


@pytest.mark.parametrize("before", [True, False])
def test_schedulers_made_before_or_after(before: bool) -> None:
    plain, chunked, a, b = pair(OPTIMIZERS["adamw"])
    schedule = O.lr_scheduler.LambdaLR(plain, lambda n: 1 / (1 + n))
    if not before:
        install(chunked)
    other = O.lr_scheduler.LambdaLR(chunked, lambda n: 1 / (1 + n))
    if before:
        install(chunked)
    for step in range(4):
        step_both(plain, chunked, a, b, step)
        schedule.step()
        other.step()
    assert schedule.get_last_lr() == other.get_last_lr()
    assert_same(plain, chunked)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_grad_scaler_with_an_inf_step(fused: bool, clip: bool) -> None:
    plain, chunked, a, b = pair(lambda g: O.AdamW(g, fused=fused))
    install(chunked, clip=Clip(0.5, tuple(b)) if clip else None)
    scales = []
    for optimizer, params in ((plain, a), (chunked, b)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            g = torch.Generator().manual_seed(step)
            loss = sum((p * torch.randn(p.shape, generator=g)).sum() for p in params)
            assert isinstance(loss, Tensor)
            torch.autograd.backward(scaler.scale(loss * (float("inf") if step == 2 else 1.0)))
            if clip:
                scaler.unscale_(optimizer)
                if params is a:
                    nn.utils.clip_grad_norm_(params, 0.5)
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] == 512.0
    assert_same(plain, chunked)


def test_scaled_gradients_cannot_be_clipped() -> None:
    _, chunked, _, b = pair(OPTIMIZERS["adamw-fused"])
    install(chunked, clip=Clip(0.5, tuple(b)))
    scaler = torch.amp.GradScaler("cpu")
    torch.autograd.backward(scaler.scale(sum((p.sum() for p in b), torch.zeros(()))))
    with pytest.raises(OffloadError, match="unscale_"):
        scaler.step(chunked)


@pytest.mark.parametrize("positional", [True, False])
def test_closure_runs_once_and_its_loss_returns(positional: bool) -> None:
    plain, chunked, a, b = pair(OPTIMIZERS["adamw"])
    install(chunked)
    calls: list[int] = []
    for optimizer, params in ((plain, a), (chunked, b)):

        def closure(optimizer: Any = optimizer, params: Any = params) -> Tensor:
            calls.append(len(calls))
            optimizer.zero_grad()
            loss = torch.stack([(p * p).sum() for p in params]).sum()
            torch.autograd.backward(loss)
            return loss

        for _ in range(3):
            out = optimizer.step(closure) if positional else optimizer.step(closure=closure)
        assert out.requires_grad
    assert len(calls) == 6
    assert_same(plain, chunked)


def test_step_hooks_fire_once_and_see_whole_groups() -> None:
    _, chunked, _, b = pair(OPTIMIZERS["adamw"])
    seen: list[tuple[str, int]] = []

    def hook(name: str) -> Callable[[Any, Any, Any], None]:
        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            assert optimizer is chunked
            seen.append((name, sum(len(g["params"]) for g in optimizer.param_groups)))

        return note

    chunked.register_step_pre_hook(hook("pre-early"))
    chunked.register_step_post_hook(hook("post-early"))
    everywhere = register_optimizer_step_post_hook(hook("global"))
    install(chunked)
    chunked.register_step_pre_hook(hook("pre-late"))
    chunked.register_step_post_hook(hook("post-late"))
    fill_grads(b, 0)
    chunked.step()
    everywhere.remove()
    names = ["pre-early", "pre-late", "post-early", "post-late", "global"]
    assert seen == [(name, len(SHAPES)) for name in names]


@pytest.mark.parametrize("name", ["adamw", "adamw-fused", "adagrad", "sgd-momentum", "adafactor"])
def test_state_dict_goes_both_ways(name: str) -> None:
    plain, chunked, a, b = pair(OPTIMIZERS[name], SPECIAL.get(name, SHAPES))
    for step in range(2):  # wrapped after training began
        step_both(plain, chunked, a, b, step)
    _, store = install(chunked)
    assert_at_home(chunked, store)
    assert_same(plain, chunked)
    for step in range(2, 5):
        step_both(plain, chunked, a, b, step)
        saved = copy.deepcopy(plain.state_dict())  # torch loads without copying
        plain.load_state_dict(copy.deepcopy(chunked.state_dict()))
        chunked.load_state_dict(saved)
        assert_at_home(chunked, store)
        assert_same(plain, chunked)


def test_state_replaced_by_hand_is_adopted() -> None:
    plain, chunked, a, b = pair(OPTIMIZERS["adamw"])
    _, store = install(chunked)
    for step in range(3):
        step_both(plain, chunked, a, b, step)
        for optimizer, p in ((plain, a[0]), (chunked, b[0])):
            optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.25)
    step_both(plain, chunked, a, b, 4)
    assert_at_home(chunked, store)
    assert_same(plain, chunked)
    plain.state.clear()
    chunked.state.clear()
    plain.step()
    chunked.step()
    assert_same(plain, chunked)


def test_unmanaged_state_stays_plain() -> None:
    class Homeless(NotHere):
        def home_of_state(self, *args: Any) -> None:
            return None

    plain, chunked, a, b = pair(OPTIMIZERS["adamw"])
    known = profile(chunked)
    store = Homeless(chunked, known, 22_000)
    ChunkedStep(chunked, known, store, piece_elements=PIECE)
    for step in range(3):
        step_both(plain, chunked, a, b, step)
    assert_same(plain, chunked)


def test_add_param_group_after_wrap() -> None:
    plain, chunked, a, b = pair(OPTIMIZERS["adamw"])
    install(chunked)
    for step in range(4):
        if step == 2:
            for optimizer, params in ((plain, a), (chunked, b)):
                params.append(nn.Parameter(torch.ones(40, 5)))
                optimizer.add_param_group({"params": params[-1:], "lr": 0.0})
        step_both(plain, chunked, a, b, step)
    assert_same(plain, chunked)
    assert torch.equal(b[-1], torch.ones(40, 5))


def test_odd_layouts_are_stepped_whole() -> None:
    layouts = []
    for _ in range(2):
        g = torch.Generator().manual_seed(3)
        across = nn.Parameter(torch.randn(40, 1000, generator=g).t())
        plain_one = nn.Parameter(torch.randn(1000, 40, generator=g))
        layouts.append([across, plain_one])
    plain, chunked = O.AdamW(layouts[0]), O.AdamW(layouts[1])
    install(chunked)
    for step in range(3):
        for params in layouts:
            fill_grads(params, step)
            g = torch.Generator().manual_seed(step)
            params[1].grad = torch.randn(40, 1000, generator=g).t()  # and it is cut in two groups
        plain.step()
        chunked.step()
    assert_same(plain, chunked)


class Counts(Optimizer):
    """Counts the steps of each group, also of one that has nothing to step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad / group["k"])


def test_a_group_without_gradients_is_stepped_as_well() -> None:
    plain, chunked, a, b = pair(Counts)
    install(chunked)
    for step in range(3):
        fill_grads(a, step)
        fill_grads(b, step)
        for p in (*plain.param_groups[1]["params"], *chunked.param_groups[1]["params"]):
            p.grad = None
        plain.step()
        chunked.step()
    assert [g["k"] for g in chunked.param_groups] == [3, 3]
    assert_same(plain, chunked)


def test_close_gives_back_the_plain_step() -> None:
    plain, chunked, a, b = pair(OPTIMIZERS["adamw"])
    work, store = install(chunked)
    for step in range(4):
        step_both(plain, chunked, a, b, step)
        if step == 1:
            work.close()
            store.entered = []
    assert store.entered == []
    assert_same(plain, chunked)
