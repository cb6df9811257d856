"""The ordinary life of a training script: whatever plain PyTorch takes, a managed model takes.

See `conftest.Twins`: each test runs twice, plain and managed, and compares all that it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from tests.small import backward, small_mlp

if TYPE_CHECKING:
    from tests.conftest import Life, Manager, Twins

ROOMY = 2**20  # for the large model; it has 1.6 MiB of weights, gradients and state
TIGHT = 160 * 1024  # for the small one, of 280 KiB
BuildOptimizer = Callable[[list[nn.Parameter]], Optimizer]


# -- which parameters are trained -------------------------------------------------------------


def test_frozen_parameters_in_the_optimizer(twins: Twins) -> None:
    def build() -> nn.Module:
        model = small_mlp()
        model.get_submodule("0").requires_grad_(False)
        return model

    twins(lambda life: life.steps(5), build=build, host_bytes=TIGHT)


def test_requires_grad_toggled_off_and_on(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(3)
        life.model.get_submodule("0").requires_grad_(False)
        life.steps(3)
        life.model.get_submodule("0").requires_grad_(True)
        life.steps(3)

    twins(live)


def test_unfrozen_after_wrap(twins: Twins) -> None:
    def build() -> nn.Module:
        model = small_mlp()
        model.get_submodule("0").requires_grad_(False)
        return model

    def live(life: Life) -> None:
        life.steps(2)
        life.model.get_submodule("0").requires_grad_(True)
        life.steps(3)

    twins(live, build=build, host_bytes=TIGHT)


def test_add_param_group(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        life.optimizer.add_param_group({"params": life.params[2:], "lr": 1e-3})
        life.steps(3)

    twins(
        live, build=small_mlp, host_bytes=TIGHT,
        build_optimizer=lambda params: torch.optim.AdamW(params[:2], lr=1e-2),
    )  # fmt: skip


def test_optimizer_with_a_parameter_outside_the_model(twins: Twins) -> None:
    outside: list[nn.Parameter] = []

    def build_optimizer(params: list[nn.Parameter]) -> Optimizer:
        outside.append(nn.Parameter(torch.linspace(1, 2, 8)))
        return torch.optim.AdamW([*params, outside[-1]], lr=1e-2)

    def live(life: Life) -> None:
        scale = outside[0] if life.run is None else outside[1]
        for seed in range(3):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
            backward((life.model(x) * scale).square().sum())
            life.optimizer.step()
            life.optimizer.zero_grad()
            life.note(scale)

    twins(live, build=small_mlp, build_optimizer=build_optimizer, host_bytes=TIGHT)


# -- the loop ---------------------------------------------------------------------------------


def test_learning_rate_schedule(twins: Twins) -> None:
    def live(life: Life) -> None:
        schedule = torch.optim.lr_scheduler.OneCycleLR(life.optimizer, 0.1, total_steps=10)
        for seed in range(6):
            life.steps(1, seed)
            schedule.step()
            life.note(schedule.get_last_lr())

    twins(live)


def test_grad_scaler_with_an_overflow(twins: Twins) -> None:
    def live(life: Life) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)
        for seed in range(6):
            loss = life.loss(seed)
            backward(scaler.scale(loss * (1e35 if seed == 2 else 1.0)))
            scaler.unscale_(life.optimizer)
            norm = nn.utils.clip_grad_norm_(life.model.parameters(), 1.0)
            scaler.step(life.optimizer)
            scaler.update()
            life.optimizer.zero_grad()
            life.note(loss, norm, scaler.get_scale())

    twins(live)


def test_closures(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(4):

            def closure(seed: int = seed) -> float:
                life.optimizer.zero_grad()
                loss = life.loss(seed)
                backward(loss)
                return loss.item()

            life.note(life.optimizer.step(closure))

    twins(live)


@pytest.mark.parametrize("foreach", [None, False])
def test_clipping_by_norm_and_value(twins: Twins, foreach: bool | None) -> None:
    def live(life: Life) -> None:
        for seed in range(5):
            backward(life.loss(seed))
            if seed % 2:
                nn.utils.clip_grad_value_(life.model.parameters(), 1e-3, foreach=foreach)
            life.note(nn.utils.clip_grad_norm_(life.model.parameters(), 0.01, foreach=foreach))
            life.optimizer.step()
            life.optimizer.zero_grad()

    twins(live)


@pytest.mark.parametrize("tamper", [False, True])
def test_max_grad_norm_equals_clip_grad_norm(twins: Twins, manage: Manager, tamper: bool) -> None:
    def live(life: Life) -> None:
        for seed in range(5):
            for micro in range(2):
                backward(life.loss(10 * seed + micro))
            if tamper:  # no version counter sees this
                for p in life.params:
                    assert p.grad is not None
                    p.grad.data.mul_(0.01)
            if life.run is None:
                nn.utils.clip_grad_norm_(life.model.parameters(), 0.05)
            life.optimizer.step()
            life.optimizer.zero_grad()

    plain, managed = (twins.start(small_mlp, torch.optim.AdamW) for _ in range(2))
    torch.manual_seed(4)
    live(plain)
    managed.run = manage(
        managed.model, managed.optimizer, host_bytes=512 * 1024, max_grad_norm=0.05,
        prefetch=twins.mode.prefetch, adversary=twins.mode.adversary,
    )  # fmt: skip
    torch.manual_seed(4)
    live(managed)
    twins.compare(plain, managed)


def test_evaluation_between_steps_and_between_forward_and_backward(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(5):
            loss = life.loss(seed)
            life.model.eval()
            with torch.no_grad():
                life.note(life.loss(60, rows=7))
            life.model.train()
            backward(loss)
            with torch.inference_mode():
                life.note(life.loss(61, rows=3))
            life.optimizer.step()
            life.optimizer.zero_grad()
            life.model.eval()
            life.note(life.loss(62).detach())  # with gradients, and never a backward pass
            life.model.train()

    twins(live)


def test_changing_batch_shapes_and_accumulation(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed, rows in enumerate([4, 4, 7, 1, 4, 16, 2, 4]):
            for micro in range(1 + seed % 3):
                backward(life.loss(10 * seed + micro, rows))
            life.note([p.grad for p in life.params])
            life.optimizer.step()
            life.optimizer.zero_grad()

    twins(live, host_bytes=ROOMY)


def test_model_called_twice_in_a_step(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(4):
            backward(life.loss(seed) * life.loss(seed + 20))
            life.optimizer.step()
            life.optimizer.zero_grad()

    twins(live, host_bytes=ROOMY)


def test_layers_called_by_themselves(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(4):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
            for layer in life.model.children():
                x = layer(x)
            backward(x.square().sum())
            life.optimizer.step()
            life.optimizer.zero_grad()
            life.note(x)

    twins(live)


def test_autocast(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = life.loss(seed)
            backward(loss)
            life.optimizer.step()
            life.optimizer.zero_grad()
            life.note(loss)

    twins(live, host_bytes=ROOMY)
