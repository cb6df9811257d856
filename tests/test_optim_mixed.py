"""Gradients in and copies out in another dtype: the bits of convert, step, copy over the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.errors import OffloadError
from offload.optim.learn import learn
from offload.optim.mirror import profile
from offload.optim.mixed import MixedTensors, Workspace
from offload.optim.ram import RamStore
from offload.optim.step import ChunkedStep, Clip

O = torch.optim  # noqa: E741
BF16 = torch.bfloat16
SHAPES = ((65539,), (7, 13), (1,), (), (300, 129), (0, 4), (33,))
PIECE = 1 << 12
GROUP = 20_480
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "adamw": lambda p: O.AdamW(p),
    "adamw-foreach": lambda p: O.AdamW(p, foreach=True),
    "adamw-fused": lambda p: O.AdamW(p, fused=True),
    "sgd-momentum": lambda p: O.SGD(p, momentum=0.9),
    "adafactor": lambda p: O.Adafactor([x for x in p if x.numel()]),
}


class Homeless(RamStore):
    """State stays where the optimizer made it."""

    def home_of_state(self, *args: Any) -> None:
        return None


class Sides:
    """The same weights twice: for the sequence over whole tensors, and in pieces."""

    def __init__(self, make: Callable[[list[nn.Parameter]], Optimizer], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        first = [torch.randn(s, generator=generator) for s in SHAPES]
        self.plain = make([nn.Parameter(torch.zeros(1))])
        if not self.plain.defaults.get("fused"):  # whose kernels take no notice of strides
            first.append(torch.randn(40, 130, generator=generator).t())
        self.a, self.b = ([nn.Parameter(t.clone()) for t in first] for _ in range(2))
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.copies = {p: torch.zeros(p.shape, dtype=dtype) for p in self.b}
        self.dtype = dtype
        self.plain, self.mixed = make(self.a), make(self.b)

    def install(self, kind: type[RamStore] = RamStore, **options: Any) -> ChunkedStep:
        known = profile(self.mixed)
        store = kind(self.mixed, known, GROUP, MixedTensors(self.gradients, self.copies))
        return ChunkedStep(self.mixed, known, store, piece_elements=PIECE, **options)

    def fill(self, step: int, skip: int | None = None) -> None:
        generator = torch.Generator().manual_seed(step + 1)
        self.gradients.clear()
        for i, (p, q) in enumerate(zip(self.a, self.b, strict=True)):
            narrow = (torch.randn(p.shape, generator=generator) * 10.0 ** (i % 3 - 2)).to(
                self.dtype
            )
            p.grad = None if i == skip else narrow.float().clone()
            if i != skip:
                self.gradients[q] = narrow

    def check(self, *, stepped: bool = True) -> None:
        state_a, state_b = (list(o.state_dict()["state"].items()) for o in (self.plain, self.mixed))
        for (i, x), (j, y) in zip(state_a, state_b, strict=True):
            assert i == j
            assert x.keys() == y.keys()
            for name, value in x.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(y[name])), (i, name)
        for p, q in zip(self.a, self.b, strict=True):
            assert torch.equal(p, q), tuple(p.shape)
            if q.numel() and stepped:
                assert torch.equal(p.to(self.dtype), self.copies[q]), tuple(p.shape)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_same_bits_as_convert_step_copy(name: str, dtype: torch.dtype) -> None:
    sides = Sides(OPTIMIZERS[name], dtype)
    sides.install()
    for step in range(4):
        sides.fill(step)
        before = {q: g.clone() for q, g in sides.gradients.items()}
        versions = [q._version for q in sides.b]
        sides.plain.step()
        sides.mixed.step()
        sides.check()
        assert all(torch.equal(g, before[q]) for q, g in sides.gradients.items())
        assert all(q.grad is None for q in sides.b)
        assert all(
            q._version > v for q, v in zip(sides.b, versions, strict=True) if q in sides.mixed.state
        )


def test_parameters_without_a_gradient_are_left_alone() -> None:
    sides = Sides(OPTIMIZERS["adamw-fused"], BF16)
    sides.install()
    for step, skip in enumerate([None, 0, None]):
        sides.fill(step, skip)
        sides.plain.step()
        sides.copies[sides.b[0]].zero_()
        sides.mixed.step()
        sides.check(stepped=skip is None)
        assert sides.copies[sides.b[0]].any() == (skip is None)


def test_gradients_in_grad_itself_are_used_where_none_is_given() -> None:
    sides = Sides(OPTIMIZERS["adamw-fused"], BF16)
    sides.install()
    sides.fill(0)
    for q in sides.b[1:]:
        q.grad_dtype = BF16
        q.grad = sides.gradients.pop(q)
    sides.plain.step()
    sides.mixed.step()
    sides.check()


@pytest.mark.parametrize("kind", [RamStore, Homeless])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_state_that_is_another_tensor_after_each_step(
    dtype: torch.dtype, kind: type[RamStore]
) -> None:
    """The gradient itself: the memory of a converted one is used again for the next piece."""

    class Keeper(Optimizer):
        def __init__(self, params: list[nn.Parameter]) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    if "last" in self.state[p]:
                        p.sub_(self.state[p]["last"], alpha=0.1)
                    self.state[p]["last"] = p.grad

    sides = Sides(lambda p: Keeper(p), dtype)
    sides.install(kind)
    for step in range(3):
        sides.fill(step)
        sides.plain.step()
        sides.mixed.step()
        sides.check()


def test_narrowed_state_and_narrow_gradients_together() -> None:
    weights = []
    for given in (torch.float32, BF16):
        sides = Sides(lambda p: O.AdamW(p[:3]), BF16)
        known, narrowing = learn(sides.mixed, "int8")
        assert known is not None
        store = RamStore(sides.mixed, known, GROUP, MixedTensors(sides.gradients, sides.copies))
        ChunkedStep(sides.mixed, known, store, piece_elements=PIECE, narrowing=narrowing)
        for step in range(3):
            sides.fill(step)
            for q, g in sides.gradients.items():
                sides.gradients[q] = g.to(given)
            sides.mixed.step()
        weights.append(sides.b[:3])
        assert all(torch.equal(sides.copies[q], q.bfloat16()) for q in sides.b[:3])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_converted_gradients_share_the_memory_of_four_pieces() -> None:
    """The point of it: not a second set of gradients, however large the parameters are."""
    seen: set[int] = set()

    class Looking(O.SGD):
        def step(self, closure: Any = None) -> Any:
            grads = [p.grad for p in self.param_groups[0]["params"] if p.grad is not None]
            seen.update(g.data_ptr() for g in grads)
            return super().step(closure)

    sides = Sides(lambda p: Looking([p[0]], lr=0.1), BF16)
    sides.install()
    seen.clear()
    for step in range(3):
        sides.fill(step)
        sides.mixed.step()
    pieces = -(-65539 // PIECE)
    assert max(seen) - min(seen) < 4 * PIECE * 4 < 4 * 65539
    assert len(seen) <= 5 < pieces


def test_refusals() -> None:
    sides = Sides(OPTIMIZERS["adamw"], BF16)
    with pytest.raises(ValueError, match="whoever keeps other gradients"):
        sides.install(clip=Clip(1.0, tuple(sides.b)))
    with pytest.raises(ValueError, match=r"shape \(7, 13\)"):
        MixedTensors({}, {sides.b[1]: torch.zeros(13, 7)})
    with pytest.raises(ValueError, match="contiguous"):
        MixedTensors({}, {sides.b[1]: torch.zeros(13, 7).t()})
    sides.install()
    sides.fill(0)
    sides.gradients[sides.b[1]] = torch.zeros(13, 7)
    with pytest.raises(OffloadError, match=r"shape \(7, 13\) has shape \(13, 7\)"):
        sides.mixed.step()


def test_workspace_hands_out_what_fits_and_more() -> None:
    space = Workspace(64, 2)
    one, two = (space.convert(torch.ones(n, dtype=BF16), torch.float32) for n in (3, 64))
    assert two.data_ptr() - one.data_ptr() == 64
    more = space.convert(torch.full((64,), 2.0, dtype=BF16), torch.float32)
    assert not 0 <= more.data_ptr() - one.data_ptr() < 512
    space.clear()
    again = space.convert(torch.full((64,), 3.0, dtype=BF16), torch.float32)
    assert again.data_ptr() == one.data_ptr()
    assert [t[0].item() for t in (two, more, again)] == [3.0, 2.0, 3.0]
