"""What the account of a device does not know of, by torch's allocator or one that is faked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.config import Tuning, understand
from offload.internals import TorchDispatchMode, backward_runs
from offload.place import Place, _multiply, choose, warm_up, with_place
from offload.prefetch.planner import smallest_bytes
from offload.steps import Kind
from offload.tiers.spec import KIB, MIB
from offload.watch import AllocatorWatch
from offload.watch import Watch as HostWatch
from tests.framed import MACHINE, adamw
from tests.resident import Run, loss_of, mlp, train

OTHERS_BYTES = 5 * MIB  # a context's, another model's


@dataclass
class Allocator:
    """Knows what really is there: of what lives on the device its tensors, not its debit.

    ``hidden_bytes``: nobody debits them. Looks whenever memory is debited or a gradient is there.
    """

    run: Run
    hidden_bytes: int = 0
    most_bytes: int = 0

    def now(self, device: object = None) -> int:
        ledger = self.run.device.engine.ledger
        there = ledger.used_bytes - ledger.fixed_bytes + sum(t.nbytes for t in self._made())
        there += OTHERS_BYTES + self.hidden_bytes
        self.most_bytes = max(self.most_bytes, there)
        return there

    def most(self, device: object = None) -> int:
        self.now()
        return self.most_bytes

    def _made(self) -> Iterator[Tensor]:
        residents = self.run.device.residents
        assert residents is not None
        yield from residents._computed._made.values()
        for param in self.run.runtime.parts.binding.residents:
            yield from (t for t in (param, param.grad) if t is not None)
            assert self.run.runtime.optimizer is not None
            state = self.run.runtime.optimizer.state[param]
            yield from (t for t in state.values() if t.dim())


Watch = Callable[[Run], Allocator]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Have a run's device watched as a GPU is."""

    def watch(run: Run) -> Allocator:
        allocator = Allocator(run)
        monkeypatch.setattr(torch.cuda, "memory_allocated", allocator.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocator.most)
        device = run.device
        device.steps.watch = AllocatorWatch(device.present_bytes, device.place)
        see: Any = device.engine.ledger.see

        def look(*_: object) -> None:
            see()
            allocator.now()

        monkeypatch.setattr(device.engine.ledger, "see", look)
        for param in run.runtime.model.parameters():
            param.register_post_accumulate_grad_hook(look)
        return allocator

    return watch


def start(memory: str, watched: Watch, **options: Any) -> tuple[nn.Module, Any, Run, Allocator]:
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, None, memory, optimizer, "64MiB", **options)
    return model, optimizer, run, watched(run)


@pytest.mark.parametrize("memory", ["1200KiB", "2500KiB"], ids=["some", "all"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bf16"])
def test_what_residents_are_yet_to_make_is_no_excess(
    memory: str, dtype: torch.dtype | None, watched: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer, run, allocator = start(memory, watched, compute_dtype=dtype)
    train(model, optimizer, range(2))
    chunks = set(run.device.residents.chunks)  # type: ignore[union-attr]
    assert chunks
    train(model, optimizer, range(2, 5))
    assert set(run.device.residents.chunks) == chunks  # type: ignore[union-attr]
    assert run.device.aside_bytes == 0
    assert "kept free" not in capsys.readouterr().err
    assert allocator.most_bytes - OTHERS_BYTES <= run.device.engine.ledger.budget_bytes
    run.runtime.close()


def hide(model: nn.Module, allocator: Allocator, size_bytes: int) -> None:
    """Have an operation of each forward pass take so much for a moment."""

    def work(*_: object) -> None:
        allocator.hidden_bytes += size_bytes
        allocator.now()
        allocator.hidden_bytes -= size_bytes

    list(model.children())[-1].register_forward_hook(work)


def test_what_was_foreseen_in_one_step_is_not_added_to_the_peak_of_another(
    watched: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first step leaves room for it; the second debits more, and takes no more than that."""
    model, optimizer, run, allocator = start("2500KiB", watched)
    ledger = run.device.engine.ledger
    with torch.no_grad():
        model(torch.randn(8, 128))  # watched by itself
    hide(model, allocator, ledger.budget_bytes - ledger.peak_bytes - 64 * KIB)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    for hooked in model.children():
        hooked._forward_hooks.clear()
    train(model, optimizer, range(1, 4))
    assert run.device.aside_bytes == 0
    assert "kept free" not in capsys.readouterr().err
    run.runtime.close()


def test_an_excess_is_kept_free_and_said(
    watched: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of the first steps may show more of it: other weights live there."""
    model, optimizer, run, allocator = start("1200KiB", watched)
    hide(model, allocator, 700 * KIB)
    for step in range(6):
        allocator.most_bytes = 0  # or a step below the peak of another would not be seen
        train(model, optimizer, range(step, step + 1))
    assert run.device.aside_bytes > 0
    assert "more of cpu than device_memory" in capsys.readouterr().err
    allocator.most_bytes = 0
    train(model, optimizer, range(6, 8))
    assert allocator.most_bytes - OTHERS_BYTES <= run.device.engine.ledger.budget_bytes
    assert not capsys.readouterr().err
    run.check_budgets()
    run.runtime.close()


def test_what_the_user_takes_between_watched_steps_is_no_excess(watched: Watch) -> None:
    model, optimizer, run, allocator = start("2500KiB", watched)
    train(model, optimizer, range(4))
    assert run.device.steps.tracks[Kind.TRAIN].trace is not None
    allocator.hidden_bytes = 64 * MIB
    train(model, optimizer, range(4, 6))
    assert run.device.aside_bytes == 0
    run.runtime.close()


def test_what_a_step_cannot_do_without_is_not_kept_free(
    watched: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A workspace of 64 MiB that comes to stay, in a budget of one."""
    model, optimizer, run, allocator = start("1200KiB", watched)
    loss = loss_of(model, 0)
    allocator.hidden_bytes = 64 * MIB
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    ledger = run.device.engine.ledger
    trace = run.device.steps.tracks[Kind.TRAIN].trace
    assert trace is not None
    assert ledger.capacity_bytes == smallest_bytes(trace)
    assert run.device.aside_bytes > 63 * MIB
    train(model, optimizer, range(1, 5))
    assert capsys.readouterr().err.count("kept free") == 1
    run.runtime.close()


def test_libraries_take_theirs_before_anybody_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    def note(what: str, result: Any = None) -> Callable[..., Any]:
        def look(*_: object) -> Any:
            happened.append(what)
            return result

        return look

    monkeypatch.setattr("offload.place._accelerator", lambda _: torch.device("cpu"))
    monkeypatch.setattr("offload.place.warm_up", note("warm"))
    monkeypatch.setattr("offload.steps.Watch", note("host", HostWatch(lambda: 0)))
    monkeypatch.setattr("offload.place._free_bytes", note("device", MIB))
    model = mlp()
    offload.wrap(model, device="cuda", device_memory="1MiB", host_memory="64MiB")
    assert happened[:2] == ["warm", "host"]
    offload.runtime(model).close()
    happened.clear()
    place = Place(torch.device("cuda"), None, own_memory=True)
    monkeypatch.setattr("offload.place._accelerator", lambda _: place.device)
    given = understand("64MiB", None, None, None)
    with_place(given, choose(model, "cuda", None, Tuning()))
    assert happened == ["warm", "device"]


def test_products_are_made_whatever_mode_the_caller_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                made.append("backward" if backward_runs() else "forward")
            return func(*args, **(kwargs or {}))

    state = torch.get_rng_state()
    with Products(), torch.inference_mode():
        _multiply(torch.device("cpu"), torch.bfloat16)
    assert made.count("forward") == 2
    assert made.count("backward") >= 2
    assert torch.equal(torch.get_rng_state(), state)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("none is left")

    monkeypatch.setattr("offload.place._multiply", fail)
    warm_up(Place(torch.device("cuda"), None, own_memory=True))


@pytest.mark.gpu
def test_workspaces_are_there_before_the_first_step() -> None:
    model = mlp()
    x = torch.ones(8, 128)
    offload.wrap(model, device="cuda", device_memory="4MiB", host_memory="80MiB")
    place = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats(place)
    before_bytes = torch.cuda.memory_allocated(place)
    model(x).sum().backward()
    assert torch.cuda.max_memory_allocated(place) - before_bytes <= 4 * MIB
    offload.runtime(model).close()


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["1200KiB", "64MiB"], ids=["some", "all"])
def test_a_gpu_takes_little_more_than_its_budget(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first gradient of a resident, or a workspace of cuBLAS', would be more."""
    monkeypatch.setattr("offload.residents.UPDATE_BYTES", 0)  # 192 MiB come first else
    model = mlp()
    optimizer = adamw(model)
    tuning = Tuning(device_chunk_bytes=80 * KIB, machine=MACHINE)
    offload.wrap(model, optimizer, device="cuda", device_memory=memory, host_memory="80MiB",
                 compute_dtype=torch.bfloat16, tuning=tuning)  # fmt: skip
    run = offload.runtime(model)
    device = run.parts.device
    assert device is not None
    for step in range(4):
        torch.cuda.reset_peak_memory_stats(device.place)
        train(model, optimizer, range(step, step + 1))
    assert run.stats()["tiers"]["device"]["resident_bytes"] > 512 * KIB
    assert device.aside_bytes < 64 * KIB
    run.close()
