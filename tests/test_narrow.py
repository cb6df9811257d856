"""Narrowed optimizer state: what is stored, what its bits depend on, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import offload
from offload.config import Tuning
from offload.errors import CheckpointError, OffloadError
from offload.finetune import OffloadEngine
from offload.optim.codecs import BLOCK_ELEMENTS, SCALE, Noise, noise_table
from offload.optim.learn import learn
from offload.optim.narrow import COUNTER, Narrowing
from offload.optim.ram import RamStore
from offload.optim.step import ChunkedStep
from offload.run import Runtime
from offload.runconfig import build_config
from offload.tiers.spec import MIB, Machine

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


# -- managed runs -----------------------------------------------------------------------------


class Runs:
    """Starts managed runs of one small model, and closes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[Runtime] = []

    def __call__(
        self,
        state_dtype: str | None,
        host_bytes: int = 4 * MIB,
        chunk_bytes: int = MIB,
        optimizer: Optimizer | None = None,
        model: nn.Module | None = None,
        **tuning: Any,
    ) -> Runtime:
        torch.manual_seed(0)
        model = model or nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
        optimizer = optimizer or O.AdamW(model.parameters(), lr=1e-3, fused=True)
        options: dict[str, Any] = {"machine": MACHINE, "poison": True, "keep_hooks": True} | tuning
        offload.wrap(
            model, optimizer, host_memory=host_bytes, disk=self._folder, state_dtype=state_dtype,
            tuning=Tuning(chunk_bytes=chunk_bytes, **options),
        )  # fmt: skip
        self._open.append(offload.runtime(model))
        return self._open[-1]

    def close(self) -> None:
        for run in self._open:
            if "_offload" in run.model.__dict__:
                run.close()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path)
    yield made
    made.close()


def train(run: Runtime, first: int, last: int) -> None:
    assert run.optimizer is not None
    for step in range(first, last):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        run.model(x).square().mean().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()


def everything(run: Runtime) -> dict[str, Tensor]:
    """Weights and stored state, copied."""
    assert run.optimizer is not None
    found = {k: v.clone() for k, v in run.model.state_dict().items()}
    for i, entries in enumerate(run.optimizer.state.values()):
        found |= {f"{i}.{k}": v.clone() for k, v in entries.items()}
    return found


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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
