"""The ordinary life of a training script: whatever plain PyTorch takes, a managed model takes.

See `conftest.Twins`: each test runs twice, plain and managed, and compares all that it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import offload
from offload.errors import OffloadError

if TYPE_CHECKING:
    from tests.conftest import Life, Manager, Twins

ROOMY = 2**20
BuildOptimizer = Callable[[list[nn.Parameter]], Optimizer]


def backward(loss: Tensor) -> None:
    """``loss.backward`` with a type."""
    loss.backward()  # type: ignore[no-untyped-call]


def small_mlp() -> nn.Module:
    """Three layers, of which one spans two chunks."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 8)
    )


# -- which parameters are trained -------------------------------------------------------------


def test_frozen_parameters_in_the_optimizer(twins: Twins) -> None:
    def build() -> nn.Module:
        model = small_mlp()
        model.get_submodule("0").requires_grad_(False)
        return model

    twins(lambda life: life.steps(5), build=build, host_bytes=ROOMY)


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

    twins(live, build=build, host_bytes=ROOMY)


def test_add_param_group(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        life.optimizer.add_param_group({"params": life.params[2:], "lr": 1e-3})
        life.steps(3)

    twins(
        live, build=small_mlp, host_bytes=ROOMY,
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

    twins(live, build=small_mlp, build_optimizer=build_optimizer, host_bytes=ROOMY)


class Odd(nn.Module):
    """Parameters used twice, never, tied, scalar, empty, integer, complex, transposed, bf16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.twice = nn.Linear(64, 64)
        self.never = nn.Linear(5, 5)
        self.tied = nn.Linear(64, 64)
        self.tied.weight = self.twice.weight
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.whole = nn.Parameter(torch.arange(5), requires_grad=False)
        self.waves = nn.Parameter(torch.randn(8, 2, dtype=torch.complex64))
        self.turned = nn.Parameter(torch.randn(130, 64).t())
        self.half = nn.Parameter(torch.randn(130, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:  # [rows, 64] -> [rows, 8]
        x = self.tied(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        x = (x * self.scalar + self.empty.sum() + self.whole.sum()) @ self.turned
        return (x.bfloat16() @ self.half).float() + self.waves.abs().sum()


def test_odd_parameters(twins: Twins) -> None:
    def trained(params: list[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW([p for p in params if p.requires_grad], lr=1e-2)

    twins(lambda life: life.steps(5), build=Odd, build_optimizer=trained, host_bytes=ROOMY)


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
def test_max_grad_norm_equals_clip_grad_norm(
    twins: Twins, manage: Manager, tamper: bool
) -> None:
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


# -- models -----------------------------------------------------------------------------------


class Pictures(nn.Module):
    """Convolutions in channels-last order, larger than a chunk, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3),
            nn.BatchNorm2d(48), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 8),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # [rows, 64] -> [rows, 8]
        pictures = x.view(-1, 1, 8, 8).to(memory_format=torch.channels_last)
        return torch.as_tensor(self.layers(pictures))


class Sequences(nn.Module):
    """A recurrent layer and an encoder layer with its fused path."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.recurrent = nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True)
        self.encoder = nn.TransformerEncoderLayer(48, 4, 64, batch_first=True)
        self.head = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:  # [rows, 64] -> [rows, 8]
        hidden, _ = self.recurrent(x.view(-1, 4, 16))
        return torch.as_tensor(self.head(self.encoder(hidden).mean(1)))


class Recomputed(nn.Module):
    """Blocks with dropout that are checkpointed by hand, each used twice."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.first, self.last = nn.Linear(64, 96), nn.Linear(96, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(96, 96), nn.Dropout(0.2), nn.ReLU()) for _ in range(3)
        )
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:  # [rows, 64] -> [rows, 8]
        x = self.first(x)
        for block in [*self.blocks, *self.blocks]:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return torch.as_tensor(self.last(x))


def parametrized() -> nn.Module:
    """Weights computed from other parameters at each access."""
    model = small_mlp()
    nn.utils.parametrizations.weight_norm(model.get_submodule("0"))
    nn.utils.parametrizations.spectral_norm(model.get_submodule("2"))
    return model


@pytest.mark.parametrize(
    "build",
    [
        Pictures, Sequences, parametrized, lambda: Recomputed(reentrant=True),
        lambda: Recomputed(reentrant=False),
    ],
    ids=["channels-last", "recurrent", "parametrized", "reentrant", "non-reentrant"],
)  # fmt: skip
def test_kinds_of_models(twins: Twins, build: Callable[[], nn.Module]) -> None:
    def live(life: Life) -> None:
        life.steps(3)
        life.model.eval()
        with torch.no_grad():
            life.note(life.loss(70))
        life.model.train()
        life.steps(2)

    twins(live, build=build, host_bytes=ROOMY)


OPTIMIZERS: dict[str, BuildOptimizer] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adafactor": lambda params: torch.optim.Adafactor(params),
    "muon": lambda params: torch.optim.Muon([p for p in params if p.dim() == 2], lr=0.1),
    "foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=1e-2, amsgrad=True),
    "adagrad": lambda params: torch.optim.Adagrad(params),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(twins: Twins, name: str) -> None:
    twins(
        lambda life: life.steps(5), build=small_mlp, build_optimizer=OPTIMIZERS[name],
        host_bytes=512 * 1024,
    )  # fmt: skip


# -- errors -----------------------------------------------------------------------------------


class Boom(Exception):
    """What user code raises."""


def interrupted(life: Life, error: type[BaseException], where: str) -> None:
    """A step that a hook cuts short in mid-forward or mid-backward."""

    def fail(*_: object) -> None:
        raise error

    layer = life.model.get_submodule("4")
    weight = life.params[4]
    handle: Any = {
        "forward": lambda: layer.register_forward_pre_hook(fail),
        "gradient": lambda: weight.register_hook(fail),
        "accumulated": lambda: weight.register_post_accumulate_grad_hook(fail),
    }[where]()
    with pytest.raises(error):
        backward(life.loss(0))
    handle.remove()
    life.optimizer.zero_grad()


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
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
        def fail(*_: object) -> float:
            raise Boom

        life.steps(2)
        with pytest.raises(Boom):
            life.optimizer.step(fail)
        handle = life.optimizer.register_step_pre_hook(fail)
        with pytest.raises(Boom):
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
        backward(F.cross_entropy(model(torch.arange(8)), torch.arange(8)))
    assert run.parts.engine.ledger.other_bytes == 0
