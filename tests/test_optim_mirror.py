"""What is learnt about an optimizer before it is trusted with anything, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.errors import CoupledOptimizerError, OffloadError
from offload.optim.groups import same
from offload.optim.mirror import profile, tiny_shape
from offload.optim.ram import RamStore
from offload.optim.state import Segment, UpdateGroup
from offload.optim.step import ChunkedStep


class Plain(torch.optim.SGD):
    """Gradient descent by hand; what subclasses do besides is `extra`."""

    def extra(self, group: dict[str, Any]) -> float:
        return 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            factor = self.extra(group)
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * factor)
        return loss


class Counting(Plain):
    """Schedule-free-like: the group counts its steps, and an attribute does too."""

    total = 0

    def extra(self, group: dict[str, Any]) -> float:
        group["k"] = group.get("k", 0) + 1
        self.last_lr = group["lr"]
        return 1 / float(group["k"])


class TensorLr(Plain):
    """The rate is a tensor that the step itself lowers in place."""

    def extra(self, group: dict[str, Any]) -> float:
        group["decay"].mul_(0.5)
        return float(group["decay"])


class Prodigal(Plain):
    """Prodigy-like: a statistic over all parameters of a group."""

    def extra(self, group: dict[str, Any]) -> float:
        group["d"] = float(sum(p.grad.norm() for p in group["params"] if p.grad is not None))
        return 1 / (1 + float(group["d"]))


class Headcount(Plain):
    """A group value that only says how many were stepped together."""

    def extra(self, group: dict[str, Any]) -> float:
        group["n"] = len(group["params"])
        return 1.0


class Dicing(Plain):
    def extra(self, group: dict[str, Any]) -> float:
        torch.rand(3)
        return 1.0


class SecretlyCoupled(Plain):
    """The same, but the statistic is not kept."""

    def extra(self, group: dict[str, Any]) -> float:
        grads = [p.grad.norm() for p in group["params"] if p.grad is not None]
        return 1 / (1 + float(sum(grads)))


class OwnList(Plain):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.mine = list(self.param_groups[0]["params"])


class StrayState(Plain):
    def extra(self, group: dict[str, Any]) -> float:
        state: Any = self.state
        state["global"]["n"] = 1
        return 1.0


class FirstParam(Plain):
    def extra(self, group: dict[str, Any]) -> float:
        return float(group["params"][0].numel() > 0)


class TwoClosures(Plain):
    def step(self, closure: Any = None) -> Any:
        if closure:
            closure()
        return super().step(closure)


class NoClosure(Plain):
    def step(self) -> Any:  # type: ignore[override]
        return super().step()


class LayerScaled(Plain):
    """LARS-like: whole tensors, each for itself."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * (group["lr"] * p.norm() / (p.grad.norm() + 1e-6)))
        return loss


class Failing(Plain):
    calls: list[int]

    def extra(self, group: dict[str, Any]) -> float:
        if any(p.numel() == 40 for p in group["params"]):
            raise KeyboardInterrupt
        return 1.0


def params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=g)
    return made


def snapshot(optimizer: Optimizer) -> Any:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    weights = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    return groups, weights, dict(optimizer.state), sorted(optimizer.__dict__)


REFUSED: dict[str, tuple[Any, str]] = {
    "statistic": (lambda p: Prodigal(p, lr=0.1), "group values|'d'"),
    "secret statistic": (lambda p: SecretlyCoupled(p, lr=0.1), "together with others"),
    "headcount": (lambda p: Headcount(p, lr=0.1), "which parameters it steps together"),
    "own list": (OwnList, "'mine'"),
    "stray state": (lambda p: StrayState(p, lr=0.1), "belongs to no parameter"),
    "first parameter": (lambda p: FirstParam(p, lr=0.1), "step without parameters fails"),
    "two closures": (lambda p: TwoClosures(p, lr=0.1), "more than once"),
    "lbfgs": (torch.optim.LBFGS, "closure"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_coupled_optimizers_are_refused_before_anything_changes(name: str) -> None:
    make, reason = REFUSED[name]
    optimizer: Any = make(params((7, 13), (40,)))
    before = snapshot(optimizer)
    with pytest.raises(CoupledOptimizerError, match=reason) as caught:
        profile(optimizer)
    assert type(optimizer).__name__ in str(caught.value)
    assert same(before, snapshot(optimizer))


def test_profile_changes_nothing() -> None:
    makes: list[Any] = [torch.optim.AdamW, torch.optim.Adagrad]
    makes += [lambda p: Counting(p, lr=0.1), lambda p: Dicing(p, lr=0.1)]
    for make in makes:
        optimizer = make(params((7, 13), (40,)))
        before, random = snapshot(optimizer), torch.get_rng_state()
        profile(optimizer)
        assert same(before, snapshot(optimizer))
        assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, fused=True), True),
        (lambda p: torch.optim.Adam(p, amsgrad=True, foreach=True), True),
        (torch.optim.NAdam, True),
        (torch.optim.Adafactor, False),
        (torch.optim.Muon, False),
        (lambda p: LayerScaled(p, lr=0.1), False),
    ],
)
def test_elementwise_is_found_by_experiment(make: Any, expected: bool) -> None:
    assert profile(make(params((30, 20), (1, 5)))).elementwise is expected


def test_a_cut_that_changes_bits_is_seen() -> None:
    class Shifting(Plain):
        """Each element also moves by its neighbour's gradient: only cut edges show it."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    with torch.no_grad():
                        p.sub_(p.grad + p.grad.view(-1).roll(1).view_as(p))

    assert not profile(Shifting(params((50,)), lr=0.1)).elementwise


SHAPES = ((64, 32), (32, 64), (50, 50), (7,), (1, 9), (), (3, 4, 5), (1,), (0, 3))


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        torch.optim.Adafactor,
        torch.optim.Adagrad,
        lambda p: torch.optim.Adam(p, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.1),
        lambda p: torch.optim.SGD(p, momentum=0.9),
    ],
)
def test_forecast_is_what_the_first_step_makes(make: Any) -> None:
    shapes = SHAPES[:-1] if make is torch.optim.Adafactor else SHAPES
    mine = params(*shapes)
    optimizer = make([{"params": mine[:4]}, {"params": mine[4:]}])
    known = profile(optimizer)
    optimizer.step()
    for p in mine:
        if not p.numel():
            continue
        made = {k: v for k, v in optimizer.state[p].items() if torch.is_tensor(v) and v.dim()}
        forecast = {t.name: (t.shape, t.dtype) for t in known.params[p].state}
        assert forecast == {k: (tuple(v.shape), v.dtype) for k, v in made.items()}
        assert set(known.params[p].unmanaged) == optimizer.state[p].keys() - made.keys()
    total = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim())
    assert known.state_bytes == total > 0


def test_tiny_shapes_keep_order_and_ones() -> None:
    assert tiny_shape((50, 8, 1, 90)) == (11, 7, 1, 13)
    assert tiny_shape(()) == ()


def install(optimizer: Optimizer) -> None:
    known = profile(optimizer)
    ChunkedStep(optimizer, known, RamStore(optimizer, known, 64), piece_elements=64)


@pytest.mark.parametrize("kind", [Counting, NoClosure, TensorLr])
def test_group_values_merge_once(kind: Any) -> None:
    both = []
    for chunked in (False, True):
        mine = params((400,), (7, 13), (40,))
        mine[2].grad = None  # a group without any gradient counts too
        optimizer = kind([{"params": mine[:2]}, {"params": mine[2:]}], lr=0.1)
        for group in optimizer.param_groups:
            group["decay"] = torch.tensor(1.0)
        held = optimizer.param_groups[0]["decay"]
        if chunked:
            install(optimizer)
        for _ in range(3):
            optimizer.step()
        assert held is optimizer.param_groups[0]["decay"]
        both.append(snapshot(optimizer))
    assert same(both[0], both[1])
    if kind is Counting:
        assert [g["k"] for g in both[1][0]] == [3, 3]


def test_coupling_that_the_probe_missed_raises_in_the_step() -> None:
    class Late(Plain):
        def extra(self, group: dict[str, Any]) -> float:
            if any(p.numel() == 400 for p in group["params"]):
                group["d"] = 1.0
            return 1.0

    mine = params((400,), (400,), (300,))
    optimizer = Late(mine, lr=0.1)
    known = profile(optimizer)

    class Whole(RamStore):
        def groups(self) -> Any:
            return [UpdateGroup(i, (Segment(p, 0, p.numel()),)) for i, p in enumerate(mine)]

    ChunkedStep(optimizer, known, Whole(optimizer, known))
    with pytest.raises(CoupledOptimizerError, match="'d'"):
        optimizer.step()


def test_an_error_in_mid_step_leaves_groups_and_hooks_whole() -> None:
    mine = params((400,), (7, 13), (40,), (20,))
    optimizer = Failing([{"params": mine[:2]}, {"params": mine[2:]}], lr=0.1)
    known = profile(optimizer)
    left: list[int] = []

    class Noting(RamStore):
        def leave(self, group: UpdateGroup) -> None:
            left.append(group.index)

    ChunkedStep(optimizer, known, Noting(optimizer, known, 10_000), piece_elements=64)
    groups = optimizer.param_groups
    listed = [list(map(id, g["params"])) for g in groups]
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer.param_groups is groups
    assert [list(map(id, g["params"])) for g in groups] == listed
    assert left == [0]
    mine[2].grad = mine[3].grad = None
    with torch.no_grad():
        mine[2].data = torch.zeros(39)
    before = mine[0].clone()
    optimizer.step()
    assert not torch.equal(before, mine[0])


def test_sparse_gradients_are_refused_by_name_of_the_remedy() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=0.1)
    install(optimizer)
    torch.autograd.backward(embedding(torch.tensor([1, 2])).sum())
    with pytest.raises(OffloadError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("cuts", "match"),
    [([(0, 400)], "0 of 40 elements"), ([(0, 30), (30, 400)], "multiples of 16")],
)
def test_bad_groups_are_refused(cuts: list[tuple[int, int]], match: str) -> None:
    mine = params((400,), (40,))
    optimizer = torch.optim.SGD(mine, lr=0.1)
    known = profile(optimizer)

    class Bad(RamStore):
        def groups(self) -> Any:
            segments = [Segment(mine[0], a, b) for a, b in cuts]
            rest = [Segment(mine[1], 0, 40)] if len(cuts) > 1 else []
            return [UpdateGroup(0, (*segments, *rest))]

    ChunkedStep(optimizer, known, Bad(optimizer, known))
    with pytest.raises(OffloadError, match=match):
        optimizer.step()


def test_stale_saved_weights_raise_as_in_plain_torch() -> None:
    for fused in (False, True):
        weight = nn.Parameter(torch.randn(8, 8))
        optimizer = torch.optim.AdamW([weight], fused=fused)
        install(optimizer)
        x = torch.randn(2, 8, requires_grad=True)
        loss: Tensor = (x @ weight).sum()
        torch.autograd.backward(loss, retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(loss)
