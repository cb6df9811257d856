"""Narrowed optimizer state: what is stored, what its bits depend on, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from offload.optim.codecs import Noise, noise_table
from offload.optim.learn import learn
from offload.optim.narrow import Narrowing
from offload.optim.ram import RamStore
from offload.optim.step import ChunkedStep
from offload.tiers.spec import Machine

O = torch.optim  # noqa: E741
MACHINE = Machine(1.8e9, 5.5e9, 1.4e9, 1.4e9, 1e10)
WIDTH, DEPTH = 320, 4
F32 = torch.float32
KINDS = ("bf16", "int8")
Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: O.AdamW(p, weight_decay=0.1),
    "adamw-fused": lambda p: O.AdamW(p, fused=True),
    "adamw-foreach": lambda p: O.AdamW(p, foreach=True, amsgrad=True),
    "sgd": lambda p: O.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: O.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
    "adagrad": lambda p: O.Adagrad(p, initial_accumulator_value=0.1),
    "nadam": lambda p: O.NAdam(p),
    "adamax": lambda p: O.Adamax(p),
}


# -- the chunked step -------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_is_the_optimizers_own_over_widened_state(name: str, state_dtype: str) -> None:
    """Against the plain optimizer whose state is narrowed and widened as a whole, by hand."""
    shapes = ((300, 257), (1,), (), (7, 13), (0, 4), (5000,))
    twins = [_params(shapes) for _ in range(2)]
    plain, chunked = (OPTIMIZERS[name](p) for p in twins)
    _, narrowing = learn(plain, state_dtype)
    learnt, other = learn(chunked, state_dtype)
    assert learnt is not None
    for p in twins[0]:
        for state in narrowing.of(p) if plain.state.get(p) else ():
            _there_and_back(narrowing, p, plain.state[p], state, None)
    store = RamStore(chunked, learnt, 16384)
    stepper = ChunkedStep(chunked, learnt, store, narrowing=other, piece_elements=4096)
    for step in range(4):
        for params in twins:
            generator = torch.Generator().manual_seed(step)
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=generator) if i != step else None
        plain.step()
        chunked.step()
        for p in twins[0]:
            entries = plain.state[p]
            for state in narrowing.of(p) if entries and p.grad is not None else ():
                _there_and_back(narrowing, p, entries, state, step)
        _assert_same(twins)
    stepper.widen_state()
    for a, b in zip(*twins, strict=True):
        assert plain.state[a].keys() == chunked.state[b].keys()
        for key, value in plain.state[a].items():
            assert value.dtype == chunked.state[b][key].dtype
            assert torch.equal(value, chunked.state[b][key]), key


def _there_and_back(
    narrowing: Narrowing, p: nn.Parameter, entries: dict[str, Any], state: str, step: int | None
) -> None:
    """``step`` None: taken in from outside, to the nearest."""
    parts = {
        state + suffix: torch.empty(-(-p.numel() // part.elements), dtype=part.dtype)
        for suffix, part in narrowing.of(p)[state].parts.items()
    }
    kept = narrowing.keep(p, state, parts, step or 0)
    kept.narrow(entries[state], 0, nearest=step is None)
    entries[state] = kept.widen(0, p.numel()).view(p.shape)


def _params(shapes: tuple[tuple[int, ...], ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(9)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _assert_same(twins: list[list[nn.Parameter]]) -> None:
    for a, b in zip(*twins, strict=True):
        assert torch.equal(a, b), tuple(a.shape)


@pytest.mark.parametrize(("state_dtype", "bound"), [("bf16", 0.01), ("int8", 0.04)])
def test_one_step_is_close_to_float32(state_dtype: str, bound: float) -> None:
    """The second step, the first that reads narrowed state, in shares of the learning rate."""
    twins = [_params(((400, 300),)) for _ in range(2)]
    exact, narrow = (O.AdamW(p, lr=1e-3) for p in twins)
    learnt, narrowing = learn(narrow, state_dtype)
    assert learnt is not None
    ChunkedStep(narrow, learnt, RamStore(narrow, learnt), narrowing=narrowing)
    for step in range(2):
        for params in twins:
            params[0].grad = torch.randn(400, 300, generator=torch.Generator().manual_seed(step))
        exact.step()
        narrow.step()
        errors = (twins[0][0] - twins[1][0]).abs() / 1e-3
        if step == 0:
            assert errors.max() == 0
    assert 0 < errors.mean() < bound
    assert errors.max() < 10 * bound


def test_parameters_added_later_keep_their_state_as_it_is() -> None:
    params = _params(((40, 50), (30,)))
    optimizer = O.AdamW(params)
    learnt, narrowing = learn(optimizer, "int8")
    assert learnt is not None
    ChunkedStep(optimizer, learnt, RamStore(optimizer, learnt), narrowing=narrowing)
    for step in range(3):
        if step == 1:
            params.append(nn.Parameter(torch.ones(20)))
            optimizer.add_param_group({"params": params[-1:]})
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.int8
    assert optimizer.state[params[-1]]["exp_avg"].dtype == F32


def test_random_bits_differ_by_parameter_state_step_and_block() -> None:
    params = _params(((40, 50), (40, 50)))
    _, narrowing = learn(O.AdamW(params), "bf16")
    keys = {
        narrowing.keep(p, name, {}, step).key
        for p in params
        for name in ("exp_avg", "exp_avg_sq")
        for step in range(50)
    }
    assert len(keys) == 200
    blocks = [run[2][:8].tolist() for run in Noise(noise_table(), min(keys), 0).runs(1 << 20)]
    assert len({tuple(b) for b in blocks}) == 16


def test_complex_state_is_left_alone() -> None:
    params = [nn.Parameter(torch.ones(20, dtype=torch.complex64)), nn.Parameter(torch.ones(20))]
    learnt, narrowing = learn(O.AdamW(params), "int8")
    assert learnt is not None
    assert not narrowing.of(params[0])
    assert set(narrowing.mirrors(learnt, params[0])) == {"exp_avg", "exp_avg_sq"}
    assert len(narrowing.mirrors(learnt, params[1])) == 4
