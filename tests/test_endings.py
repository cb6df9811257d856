"""Errors in user code, and the beginning and end of a managed model's life."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import offload
from offload.errors import OffloadError
from offload.watch import Watch
from tests.small import backward, small_mlp

if TYPE_CHECKING:
    from tests.conftest import Life, Manager, Twins


# -- errors -----------------------------------------------------------------------------------


class UserError(Exception):
    """What user code raises."""


def interrupted(life: Life, error: type[BaseException], where: str) -> None:
    """A step that a hook cuts short in mid-forward or mid-backward."""

    def fail(*_: object) -> None:
        raise error

    layer: Any = life.model.get_submodule("4")
    weight: Any = life.params[4]
    register: dict[str, Callable[[], Any]] = {
        "forward": lambda: layer.register_forward_pre_hook(fail),
        "gradient": lambda: weight.register_hook(fail),
        "accumulated": lambda: weight.register_post_accumulate_grad_hook(fail),
    }
    handle = register[where]()
    with pytest.raises(error):
        backward(life.loss(0))
    handle.remove()
    life.optimizer.zero_grad()


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "gradient", "accumulated"])
def test_training_goes_on_after_an_error(
    twins: Twins, error: type[BaseException], where: str
) -> None:
    def live(life: Life) -> None:
        for seed in range(4):  # in the recorded step and in planned ones
            interrupted(life, error, where)
            life.steps(1, seed)
        if life.run is not None:
            assert life.run.parts.engine.ledger.other_bytes == 0

    twins(live)


def test_error_in_a_closure_or_step_hook(twins: Twins) -> None:
    def live(life: Life) -> None:
        def fail(*_: Any) -> Any:
            raise UserError

        life.steps(2)
        with pytest.raises(UserError):
            life.optimizer.step(fail)
        handle = life.optimizer.register_step_pre_hook(fail)
        with pytest.raises(UserError):
            life.optimizer.step()
        handle.remove()
        life.steps(2)

    twins(live)


def test_other_models_are_untouched_after_an_interrupt(manage: Manager, twins: Twins) -> None:
    life = twins.start(small_mlp, torch.optim.AdamW)
    life.run = manage(life.model, life.optimizer, host_bytes=256 * 1024)
    life.model.get_submodule("4").register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        life.loss(0)
    other = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))  # 2 MiB
    backward(other(torch.randn(64, 256)).sum())
    assert life.run.parts.engine.ledger.other_bytes == 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# -- beginning and end ------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["unwrap", "close", "with"])
def test_ending_and_wrapping_again(twins: Twins, manage: Manager, end: str) -> None:
    def live(life: Life) -> None:
        life.steps(3)
        backward(life.loss(30))
        if life.run is not None and end == "unwrap":
            assert life.run.unwrap() == (life.model, life.optimizer)
        elif life.run is not None and end == "close":
            life.run.close()
        elif life.run is not None:
            with life.run:
                pass
        life.optimizer.step()
        life.optimizer.zero_grad()
        life.steps(2)
        if life.run is not None:
            with pytest.raises(OffloadError, match="not managed"):
                offload.runtime(life.model)
            manage(life.model, life.optimizer, host_bytes=512 * 1024)
        life.steps(3)

    twins(live)


def test_wrapping_twice_is_refused(manage: Manager, twins: Twins) -> None:
    life = twins.start(small_mlp, torch.optim.AdamW)
    manage(life.model, life.optimizer)
    with pytest.raises(OffloadError, match="managed already"):
        manage(life.model, life.optimizer)
    life.steps(1)


def test_optimizer_that_has_state_already(twins: Twins, manage: Manager) -> None:
    plain, managed = (twins.start(small_mlp, torch.optim.AdamW) for _ in range(2))
    for life in (plain, managed):
        torch.manual_seed(4)
        life.steps(2)
        backward(life.loss(9))
        if life is managed:
            life.run = manage(life.model, life.optimizer, host_bytes=512 * 1024)
        backward(life.loss(10))
        life.optimizer.step()
        life.optimizer.zero_grad()
        life.steps(2)
    twins.compare(plain, managed)


@pytest.mark.parametrize("disk", [True, False])
def test_model_without_parameters(manage: Manager, disk: bool) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, affine=False))
    manage(model, None, disk=disk)
    model(torch.randn(4, 3))
    assert int(model.get_buffer("1.num_batches_tracked")) == 1


def test_model_for_inference_only(manage: Manager, twins: Twins) -> None:
    plain, managed = (twins.start(small_mlp, torch.optim.AdamW) for _ in range(2))
    manage(managed.model, None, host_bytes=96 * 1024)
    for life in (plain, managed):
        life.model.eval()
        with torch.no_grad():
            life.note(*[life.loss(seed, rows=1 + seed) for seed in range(6)])
    twins.compare(plain, managed)


def test_what_cannot_be_managed_is_refused_by_name(manage: Manager) -> None:
    lazy = nn.Sequential(nn.LazyLinear(5))
    with pytest.raises(OffloadError, match=r"0\.weight has no shape yet"):
        manage(lazy)
    shared = small_mlp()
    shared.add_module("twin", nn.Linear(64, 8))
    shared.get_parameter("twin.weight").data = shared.get_parameter("4.weight").data
    with pytest.raises(OffloadError, match=r"4\.weight and twin\.weight .* same memory"):
        manage(shared)


def test_sparse_gradient_is_refused_by_name(manage: Manager) -> None:
    model = nn.Sequential(nn.Embedding(100, 64, sparse=True), nn.Linear(64, 8))
    run = manage(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(OffloadError, match=r"0\.weight has a sparse gradient"):
        backward(cross_entropy(model(torch.arange(8)), torch.arange(8)))
    assert run.parts.engine.ledger.other_bytes == 0


@pytest.mark.parametrize("device", [None, "emulated"])
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_func_transforms_are_refused_with_the_remedy(
    tmp_path: Path, transform: str, device: str | None
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    memory = "64MiB" if device else None
    offload.wrap(model, host_memory="64MiB", disk=tmp_path, device=device, device_memory=memory)

    def call() -> Tensor:
        if transform == "grad":
            transformed = torch.func.grad(lambda x: model(x).sum())
            result: Tensor = transformed(torch.ones(2, 8))
        else:
            result = torch.vmap(model)(torch.ones(3, 2, 8))
        return result

    with pytest.raises(OffloadError, match=r"torch\.func transforms .*\.unwrap\(\) first"):
        call()
    model(torch.ones(2, 8)).sum().backward()  # still usable
    offload.runtime(model).unwrap()
    assert call().shape == ((2, 8) if transform == "grad" else (3, 2, 1))


def test_no_thread_outlives_a_run_in_mid_step(manage: Manager) -> None:
    """A recorded step is sampled by a thread: closing the run ends that too."""

    before, model = set(threading.enumerate()), small_mlp()

    def sampling() -> int:
        return sum(t.name == "offload-watch" for t in set(threading.enumerate()) - before)

    run = manage(model, None)
    model(torch.ones(2, 64))
    assert sampling() == 1, "the first step is not watched"
    run.close()
    assert sampling() == 0


def test_a_sampling_thread_ends_with_what_it_samples() -> None:
    """Where a run is dropped without being closed nothing else would stop it."""
    watch = Watch(lambda: 0)
    before = set(threading.enumerate())
    watch.start()
    (thread,) = set(threading.enumerate()) - before
    del watch
    thread.join(timeout=10)
    assert not thread.is_alive()
