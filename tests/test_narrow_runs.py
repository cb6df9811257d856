"""Managed runs with narrowed optimizer state: budgets, checkpoints, state dicts and endings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from offload.errors import CheckpointError, OffloadError
from offload.finetune import OffloadEngine
from offload.optim.codecs import BLOCK_ELEMENTS, SCALE
from offload.optim.narrow import COUNTER
from offload.run import Runtime
from offload.runconfig import build_config
from offload.tiers.spec import MIB
from tests.narrowed import DEPTH, KINDS, WIDTH, Runs, assert_equal, everything, train

O = torch.optim  # noqa: E741
F32 = torch.float32


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("state_dtype", KINDS)
def test_same_bits_for_every_budget(runs: Runs, state_dtype: str) -> None:
    ways: list[dict[str, Any]] = [
        {"host_bytes": 64 * MIB},
        {},
        {"prefetch": False},
        {"adversary": 5},
        {"adversary": 6, "chunk_bytes": 2 * MIB, "host_bytes": 10 * MIB},
    ]
    results = []
    for way in ways:
        run = runs(state_dtype, **way)
        train(run, 0, 6)
        evictions = run.stats()["counters"]["evictions"]
        assert evictions > 20 or "host_bytes" in way
        results.append(everything(run))
        assert run.optimizer is not None
        counters = {group.get(COUNTER) for group in run.optimizer.param_groups}
        assert counters == ({6} if state_dtype == "bf16" else {None})
        run.close()
    for other in results[1:]:
        assert_equal(results[0], other)


def test_fewer_bytes_are_kept_and_moved(runs: Runs) -> None:
    weights = DEPTH * (WIDTH * WIDTH + WIDTH) * 4
    state, moved = {}, {}
    for state_dtype in (None, *KINDS):
        run = runs(state_dtype)
        train(run, 0, 5)
        family = run.parts.binding.families[0]
        chunks = run.parts.engine.space.chunks
        ids = [c for region in family.states.values() for c in region.chunk_ids]
        elements = family.layout.total_elements
        state[state_dtype] = sum(chunks[c].size_bytes for c in ids) / elements
        moved[state_dtype] = {k: v / weights for k, v in run.stats()["step_bytes"].items()}
        run.close()
    assert state == {None: 8.0, "bf16": 4.0, "int8": 2 + 8 / BLOCK_ELEMENTS}
    # Of 2 copies of the weights' bytes 1, and 1 1/2, stay away in each direction; padding apart.
    for direction in ("read", "write"):
        assert moved["bf16"][direction] < moved[None][direction] - 0.95
        assert moved["int8"][direction] < moved[None][direction] - 1.35


@pytest.mark.parametrize("state_dtype", KINDS)
def test_a_run_goes_on_with_the_same_bits(runs: Runs, state_dtype: str, tmp_path: Path) -> None:
    run = runs(state_dtype)
    train(run, 0, 3)
    run.save(tmp_path / "checkpoint")
    stored = sum(p.stat().st_size for p in (tmp_path / "checkpoint").glob("optimizer*"))
    exact = 8 * DEPTH * (WIDTH * WIDTH + WIDTH)
    assert stored < exact * {"bf16": 0.51, "int8": 0.27}[state_dtype]
    train(run, 3, 6)
    whole = everything(run)
    run.close()
    other = runs(state_dtype, host_bytes=8 * MIB, chunk_bytes=2 * MIB)
    train(other, 40, 42)
    other.load(tmp_path / "checkpoint")
    train(other, 3, 6)
    assert_equal(whole, everything(other))


def test_a_checkpoint_of_another_state_dtype_is_refused(runs: Runs, tmp_path: Path) -> None:
    for i, (one, other) in enumerate(((None, "bf16"), ("bf16", None), ("int8", "bf16"))):
        run = runs(one)
        train(run, 0, 1)
        run.save(tmp_path / str(i))
        run.close()
        run = runs(other)
        before = everything(run)
        with pytest.raises(CheckpointError, match=f"state_dtype is {one!r}, not {other!r}"):
            run.load(tmp_path / str(i))
        assert_equal(before, everything(run))
        run.close()


def test_finetune_passes_it_on() -> None:
    config = build_config({"optimizer.state_dtype": "int8"})
    model = nn.Linear(64, 64)
    run = OffloadEngine().wrap(model, O.AdamW(model.parameters()), config)
    assert isinstance(run, Runtime)
    assert run.state_dtype == "int8"
    run.close()


@pytest.mark.parametrize("state_dtype", KINDS)
def test_state_dict_goes_both_ways(runs: Runs, state_dtype: str) -> None:
    run = runs(state_dtype)
    train(run, 0, 3)
    assert run.optimizer is not None
    shown = copy.deepcopy(run.optimizer.state_dict())
    entries = shown["state"][0]
    assert not any(name.endswith(SCALE) for name in entries)
    assert entries["exp_avg"].shape == (WIDTH, WIDTH)
    assert entries["exp_avg"].dtype == (torch.bfloat16 if state_dtype == "bf16" else F32)
    assert entries["exp_avg_sq"].float().min() >= 0
    before = everything(run)
    train(run, 3, 4)
    run.optimizer.load_state_dict(shown)
    run.model.load_state_dict({k: before[k] for k in run.model.state_dict()})
    assert_equal(before, everything(run))
    train(run, 3, 5)
    after = everything(run)
    run.close()
    again = runs(state_dtype)
    train(again, 0, 5)
    assert_equal(after, everything(again))


def test_float32_state_is_taken_in(runs: Runs) -> None:
    """Loaded, put there by hand, or older than the run."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    optimizer = O.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    exact = copy.deepcopy(optimizer.state_dict())
    run = runs("int8", model=model, optimizer=optimizer)
    first = next(model.parameters())
    for taking in ("older", "loaded", "by hand"):
        if taking == "loaded":
            optimizer.load_state_dict(copy.deepcopy(exact))
        elif taking == "by hand":
            optimizer.state[first]["exp_avg"] = exact["state"][0]["exp_avg"].clone()
            optimizer.step()  # without gradients
        assert optimizer.state[first]["exp_avg"].dtype == torch.int8
        shown = optimizer.state_dict()["state"][0]
        for name in ("exp_avg", "exp_avg_sq"):
            error = (shown[name] - exact["state"][0][name]).abs().max()
            assert error < 0.02 * exact["state"][0][name].abs().max(), taking
        train(run, 0, 2)


def test_unwrap_gives_the_optimizers_own_dtypes(runs: Runs) -> None:
    for state_dtype in KINDS:
        run = runs(state_dtype)
        train(run, 0, 2)
        model, optimizer = run.unwrap()
        assert optimizer is not None
        for p in model.parameters():
            assert optimizer.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert optimizer.state[p]["exp_avg"].dtype == F32
            p.grad = torch.ones_like(p)
        optimizer.step()
        runs(state_dtype, model=model, optimizer=optimizer).close()
        with pytest.raises(OffloadError, match="end that run with unwrap"):
            runs(None, model=model, optimizer=optimizer)


STEPPERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: O.AdamW(p, lr=1e-3),
    "sgd": lambda p: O.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("state_dtype", KINDS)
@pytest.mark.parametrize("name", STEPPERS)
def test_narrow_state_of_a_closed_run_is_not_stepped(
    name: str, state_dtype: str, runs: Runs
) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    optimizer = STEPPERS[name](list(model.parameters()))
    run = runs(state_dtype, model=model, optimizer=optimizer)
    train(run, 0, 2)
    run.close()
    before = everything(run)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(OffloadError, match=rf"stored as {state_dtype}.*unwrap\(\)"):
            optimizer.step()
        assert_equal(before, everything(run))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    tensors = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    assert {t.dtype for t in tensors} == {F32}
    optimizer.zero_grad()
    train(runs(state_dtype, model=model, optimizer=optimizer), 2, 4)


@pytest.mark.parametrize("state_dtype", KINDS)
def test_update_in_the_backward_pass_has_the_same_bits(state_dtype: str, runs: Runs) -> None:
    results = []
    for early in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3 * DEPTH)))
        run = runs(state_dtype, step_in_backward=early, host_bytes=6 * MIB, model=model)
        train(run, 0, 6)
        assert run.stats()["counters"]["evictions"] > 20
        assert (run.parts.early is not None and run.parts.early.active) is early
        results.append(everything(run))
        run.close()
    assert_equal(*results)
