"""Optimizers stepped in chunks beside plain ones: for the tests of the chunked step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.optim.mirror import profile
from offload.optim.ram import RamStore
from offload.optim.state import UpdateGroup
from offload.optim.step import ChunkedStep

O = torch.optim  # noqa: E741
SHAPES = ((65539,), (7, 13), (1,), (), (64, 32), (3, 5, 7), (1, 9), (0, 4))
MATRICES = ((64, 32), (7, 13), (33, 129))
SPECIAL = {"muon": MATRICES, "adafactor": SHAPES[:-1]}
PIECE = 1 << 14
Groups = list[dict[str, Any]]
Make = Callable[[Groups], Optimizer]


class NotHere(RamStore):
    """Everything that is not resident reads as NaN, between the first enter and the last leave."""

    def __init__(self, optimizer: Optimizer, known: Any, group_elements: int) -> None:
        super().__init__(optimizer, known, group_elements)
        self.away: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.entered: list[int] = []

    def enter(self, group: UpdateGroup) -> None:
        if group.index == 0:
            self.entered = []
            for g in self.groups():
                self.hide(g)
        self.entered.append(group.index)
        for place, value in self.away.pop(group.index):
            place.copy_(value)

    def leave(self, group: UpdateGroup) -> None:
        self.hide(group)
        if group.index == len(self.groups()) - 1:
            self.show()

    def hide(self, group: UpdateGroup) -> None:
        self.away[group.index] = [(t, t.clone()) for t in self.tensors(group)]
        for place, _ in self.away[group.index]:
            place.fill_(float("nan"))

    def show(self) -> None:
        for place, value in itertools.chain.from_iterable(self.away.values()):
            place.copy_(value)
        self.away = {}

    def tensors(self, group: UpdateGroup) -> Iterator[Tensor]:
        """What the group's segments own; `.data`, as bytes come and go unseen by autograd."""
        for s in group.segments:
            homes = [h for (p, _), h in self._homes.items() if p is s.param]
            grads = [] if s.param.grad is None else [s.param.grad]
            for t in (s.param.data, *grads, *homes):
                if t.numel() == s.param.numel() and t.is_contiguous():
                    yield t.data.view(-1)[s.start : s.stop]
                elif s.stop - s.start == s.param.numel():
                    yield t.data


def make_params(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g)) for s in shapes]


def grouped(params: list[nn.Parameter]) -> Groups:
    half = len(params) // 2
    return [{"params": params[:half], "lr": 3e-3}, {"params": params[half:], "lr": 1e-3}]


def fill_grads(params: list[nn.Parameter], step: int, skip: int | None = None) -> None:
    g = torch.Generator().manual_seed(step + 100)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=g) * 10.0 ** (i % 3 - 2)
        p.grad = None if i == skip else grad


def step_both(
    plain: Optimizer, chunked: Optimizer, a: list[nn.Parameter], b: list[nn.Parameter], step: int
) -> None:
    """The same gradients for both, then a step of each."""
    fill_grads(a, step)
    fill_grads(b, step)
    plain.step()
    chunked.step()


def install(optimizer: Optimizer, **options: Any) -> tuple[ChunkedStep, NotHere]:
    known = profile(optimizer)
    store = NotHere(optimizer, known, 22_000)
    return ChunkedStep(optimizer, known, store, piece_elements=PIECE, **options), store


def assert_same(a: Optimizer, b: Optimizer) -> None:
    """Weights, state, group values and order, bit for bit."""
    state_a, state_b = a.state_dict(), b.state_dict()
    assert state_a["param_groups"] == state_b["param_groups"]
    assert state_a["state"].keys() == state_b["state"].keys()
    for ga, gb in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(ga["params"], gb["params"], strict=True):
            assert torch.equal(p, q), f"weights of {tuple(p.shape)}"
            assert a.state.get(p, {}).keys() == b.state.get(q, {}).keys()
            for name, value in a.state.get(p, {}).items():
                other = b.state[q][name]
                same = torch.equal(value, other) if torch.is_tensor(value) else value == other
                assert same, f"{name} of {tuple(p.shape)}"
                assert not torch.is_tensor(value) or value.shape == other.shape


def assert_at_home(optimizer: Optimizer, store: RamStore) -> None:
    homes = 0
    for p, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(p, nn.Parameter) and torch.is_tensor(value) and value.dim() * p.dim():
                home = store.home_of_state(p, name, value.shape, value.dtype)
                assert value is home
                homes += 1
    assert homes


def pair(make: Make, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> tuple[Any, Any, Any, Any]:
    a, b = make_params(shapes), make_params(shapes)
    return make(grouped(a)), make(grouped(b)), a, b


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda g: O.AdamW(g, weight_decay=0.1),
    "adamw-foreach": lambda g: O.AdamW(g, foreach=True),
    "adamw-fused": lambda g: O.AdamW(g, fused=True),
    "adamw-maximize": lambda g: O.AdamW(g, maximize=True),
    "adam-amsgrad": lambda g: O.Adam(g, amsgrad=True),
    "nadam": lambda g: O.NAdam(g),
    "sgd": lambda g: O.SGD(g),
    "sgd-momentum": lambda g: O.SGD(g, momentum=0.9, nesterov=True),
    "sgd-fused": lambda g: O.SGD(g, momentum=0.9, fused=True),
    "rmsprop": lambda g: O.RMSprop(g, centered=True, momentum=0.5),
    "adagrad": lambda g: O.Adagrad(g, initial_accumulator_value=0.1),
    "radam": lambda g: O.RAdam(g),
    "adamax": lambda g: O.Adamax(g),
    "asgd": lambda g: O.ASGD(g),
    "adafactor": lambda g: O.Adafactor(g),
    "muon": lambda g: O.Muon(g),
}
CUT = [name for name in OPTIMIZERS if name not in SPECIAL]
