"""P1: placement is invisible. Ten steps give the bits of the unwrapped run, wherever chunks live.

Not the full product of models, budgets and modes, but a set that covers each of their pairs. The
budgets are found, not guessed: `smallest` is the planner's own minimum for the recorded step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim import Optimizer

from offload.errors import BudgetError
from offload.prefetch.planner import smallest_bytes
from offload.run import Runtime
from offload.steps import Kind

if TYPE_CHECKING:
    from tests.conftest import Life, Manager, Numbers, Twins, Zoo

FAMILIES = ["gpt2", "llama", "llama-tied", "t5", "vit", "mixtral"]
OFF, REENTRANT, NON_REENTRANT = "off", "reentrant", "non-reentrant"
CHECKPOINTED = [
    ("gpt2", NON_REENTRANT), ("llama", REENTRANT), ("llama", NON_REENTRANT),
    ("llama-tied", REENTRANT), ("t5", NON_REENTRANT), ("vit", REENTRANT), ("mixtral", REENTRANT),
    ("mixtral", NON_REENTRANT),
]  # fmt: skip
ALL = [(name, OFF) for name in FAMILIES] + CHECKPOINTED
CHUNK_BYTES = 16 * 1024


@dataclass(frozen=True)
class Case:
    """One model with what is known of it from a plain and an unlimited run."""

    name: str
    checkpointing: str
    plain: Numbers
    unlimited: Numbers
    unlimited_evictions: int
    all_bytes: int  # weights, gradients and state
    smallest_bytes: int


class Cases:
    """Makes each case once for all tests."""

    def __init__(self, zoo: Zoo) -> None:
        self.zoo = zoo
        self._known: dict[tuple[str, str], Case] = {}

    def get(self, name: str, checkpointing: str, manage: Manager) -> Case:
        key = (name, checkpointing)
        if key not in self._known:
            self._known[key] = self._make(name, checkpointing, manage)
        return self._known[key]

    def start(self, name: str, checkpointing: str) -> tuple[nn.Module, Optimizer]:
        model = self.zoo.build(name, checkpointing)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def _make(self, name: str, checkpointing: str, manage: Manager) -> Case:
        plain = self.zoo.train(name, *self.start(name, checkpointing))
        model, optimizer = self.start(name, checkpointing)
        run = manage(model, optimizer)
        unlimited = self.zoo.train(name, model, optimizer)
        engine, trace = run.parts.engine, run.parts.steps.tracks[Kind.TRAIN].trace
        assert trace is not None
        return Case(
            name, checkpointing, plain, unlimited, engine.counters.evictions,
            sum(c.size_bytes for c in engine.space.chunks),
            smallest_bytes(trace) + engine.ledger.fixed_bytes,
        )  # fmt: skip


@pytest.fixture(scope="module")
def cases(zoo: Zoo) -> Cases:
    return Cases(zoo)


def moved_bytes(run: Runtime) -> tuple[int, int]:
    """Bytes read from and written to the disk by a run."""
    lanes = run.parts.engine.space.lanes
    return lanes["read"].meter.moved_bytes, lanes["write"].meter.moved_bytes


def check(
    cases: Cases, manage: Manager, case: Case, host_bytes: int, *, prefetch: bool = True,
    adversary: int | None = None, least_gone: int = 1,
) -> None:  # fmt: skip
    """A run under this budget has the plain run's bits, and chunks really moved."""
    model, optimizer = cases.start(case.name, case.checkpointing)
    run = manage(
        model, optimizer, host_bytes=host_bytes, prefetch=prefetch, adversary=adversary
    )  # fmt: skip
    watch = manage.watch(run)
    numbers = cases.zoo.train(case.name, model, optimizer, watch=watch)
    assert cases.zoo.same(numbers, case.plain)
    assert watch.gone_between >= least_gone, "no weight left between forward and backward"
    assert watch.loaded_in_backward > 0, "no weight was fetched again for the backward pass"
    read, written = moved_bytes(run)
    assert read > case.all_bytes
    assert written > case.all_bytes
    assert run.parts.engine.ledger.peak_bytes <= host_bytes
    planned = run.parts.engine.counters.planned_loads
    assert (planned > 0) == prefetch


@pytest.mark.parametrize(("name", "checkpointing"), ALL)
def test_unlimited(cases: Cases, manage: Manager, name: str, checkpointing: str) -> None:
    case = cases.get(name, checkpointing, manage)
    assert cases.zoo.same(case.unlimited, case.plain)
    assert case.smallest_bytes < case.all_bytes / 2, "the tight budgets would prove nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_half(cases: Cases, manage: Manager, name: str) -> None:
    case = cases.get(name, OFF, manage)
    # A good plan may let state go instead of weights: that chunks moved is checked all the same.
    check(cases, manage, case, case.all_bytes // 2, least_gone=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_smallest_completing_out_of_order(cases: Cases, manage: Manager, name: str) -> None:
    case = cases.get(name, OFF, manage)
    check(cases, manage, case, case.smallest_bytes, adversary=7, least_gone=100)


@pytest.mark.parametrize("prefetch", [True, False], ids=["planned", "on-demand"])
@pytest.mark.parametrize(
    ("name", "checkpointing"), [("llama", REENTRANT), ("llama", NON_REENTRANT)]
)
@pytest.mark.parametrize("disk", [True, False], ids=["half", "all fits"])
def test_ample_memory_with_checkpointing(
    cases: Cases, manage: Manager, name: str, checkpointing: str, prefetch: bool, disk: bool
) -> None:
    case = cases.get(name, checkpointing, manage)
    if disk:
        check(cases, manage, case, case.all_bytes // 2, prefetch=prefetch)
        return
    model, optimizer = cases.start(name, checkpointing)
    run = manage(model, optimizer, disk=False, prefetch=prefetch)
    assert cases.zoo.same(cases.zoo.train(name, model, optimizer), case.plain)
    assert moved_bytes(run) == (0, 0)


@pytest.mark.parametrize(("name", "checkpointing"), CHECKPOINTED)
def test_smallest_with_checkpointing(
    cases: Cases, manage: Manager, name: str, checkpointing: str
) -> None:
    case = cases.get(name, checkpointing, manage)
    seed = 13 if checkpointing == REENTRANT else None
    check(cases, manage, case, case.smallest_bytes, adversary=seed, least_gone=100)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("gpt2", OFF), ("llama", NON_REENTRANT), ("llama-tied", OFF), ("mixtral", REENTRANT)],
)
def test_smallest_on_demand(cases: Cases, manage: Manager, name: str, checkpointing: str) -> None:
    case = cases.get(name, checkpointing, manage)
    check(cases, manage, case, case.smallest_bytes, prefetch=False, least_gone=100)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_disk(cases: Cases, manage: Manager, name: str) -> None:
    case = cases.get(name, OFF, manage)
    model, optimizer = cases.start(name, OFF)
    run = manage(model, optimizer, disk=False)
    assert cases.zoo.same(cases.zoo.train(name, model, optimizer), case.plain)
    assert moved_bytes(run) == (0, 0)


@pytest.mark.parametrize(("name", "checkpointing"), ALL)
def test_one_chunk_less_than_smallest_is_refused(
    cases: Cases, manage: Manager, name: str, checkpointing: str
) -> None:
    case = cases.get(name, checkpointing, manage)
    model, optimizer = cases.start(name, checkpointing)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    manage(model, optimizer, host_bytes=case.smallest_bytes - CHUNK_BYTES)
    with pytest.raises(BudgetError, match="host_memory of at least") as refusal:
        cases.zoo.train(name, model, optimizer)
    assert refusal.value.tier == "host"
    assert 0 < refusal.value.smallest_bytes - refusal.value.given_bytes <= CHUNK_BYTES + 1024
    assert cases.zoo.same(before, dict(model.state_dict()))


def test_two_threads(cases: Cases, manage: Manager) -> None:
    torch.set_num_threads(2)
    try:
        model, optimizer = cases.start("llama", OFF)
        plain = cases.zoo.train("llama", model, optimizer, steps=3)
        model, optimizer = cases.start("llama", OFF)
        manage(model, optimizer, host_bytes=800_000)
        assert cases.zoo.same(cases.zoo.train("llama", model, optimizer, steps=3), plain)
    finally:
        torch.set_num_threads(1)


class Products(nn.Module):
    """Both ways to write a linear layer; autograd saves a view of the weight for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a = nn.Parameter(torch.randn(128, 64) / 8)
        self.b = nn.Parameter(torch.randn(128, 128) / 8)
        self.c = nn.Parameter(torch.randn(8, 128) / 8)

    def forward(self, x: Tensor) -> Tensor:  # [rows, 64] -> [rows, 8]
        x = torch.tanh(x @ self.a.t())
        x = torch.tanh(linear(x, self.b))
        return x @ self.c.t()


def test_weights_evicted_between_forward_and_backward(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(5):
            loss = life.loss(seed)
            life.evict()
            loss.backward()
            life.note(loss, [p.grad for p in life.params])
            life.evict()
            life.optimizer.step()
            life.optimizer.zero_grad()

    twins(live, build=Products)
    twins(live)


def test_same_bits_twice_with_another_adversary(cases: Cases, manage: Manager) -> None:
    case = cases.get("llama", OFF, manage)
    for seed in (21, 22):
        model, optimizer = cases.start("llama", OFF)
        manage(model, optimizer, host_bytes=case.smallest_bytes, adversary=seed)
        assert cases.zoo.same(cases.zoo.train("llama", model, optimizer), case.plain)
