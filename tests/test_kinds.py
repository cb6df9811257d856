"""Kinds of models, parameters and optimizers: each gives the bits of the unwrapped run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from tests.small import small_mlp

if TYPE_CHECKING:
    from tests.conftest import Life, Twins

TIGHT = 160 * 1024
BuildOptimizer = Callable[[list[nn.Parameter]], Optimizer]


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
        self.short = nn.Parameter(torch.randn(130, 8, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:  # [rows, 64] -> [rows, 8]
        x = self.tied(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        x = (x * self.scalar + self.empty.sum() + self.whole.sum()) @ self.turned
        return (x.bfloat16() @ self.short).float() + self.waves.abs().sum()


def test_odd_parameters(twins: Twins) -> None:
    def trained(params: list[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW([p for p in params if p.requires_grad], lr=1e-2)

    def live(life: Life) -> None:
        for seed in range(5):
            life.steps(1, seed)
            life.evict()

    twins(live, build=Odd, build_optimizer=trained, host_bytes=2**20)


class Pictures(nn.Module):
    """Convolutions in channels-last order, larger than a chunk, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3),
            nn.BatchNorm2d(48), nn.Conv2d(48, 48, 3, padding=1), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(48, 8),
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
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x)
        return torch.as_tensor(self.last(x))


def parametrized() -> nn.Module:
    """Weights computed from other parameters at each access."""
    model = small_mlp()
    nn.utils.parametrizations.weight_norm(model.get_submodule("0"))
    nn.utils.parametrizations.spectral_norm(model.get_submodule("2"))
    return model


@pytest.mark.parametrize(
    ("build", "host_kib"),
    [
        (Pictures, 400), (Sequences, 304), (parametrized, 160),
        (lambda: Recomputed(reentrant=True), 208), (lambda: Recomputed(reentrant=False), 208),
    ],
    ids=["channels-last", "recurrent", "parametrized", "reentrant", "non-reentrant"],
)  # fmt: skip
def test_kinds_of_models(twins: Twins, build: Callable[[], nn.Module], host_kib: int) -> None:
    def live(life: Life) -> None:
        life.steps(3)
        life.model.eval()
        with torch.no_grad():
            life.note(life.loss(70))
        life.model.train()
        life.steps(2)

    twins(live, build=build, host_bytes=host_kib * 1024)


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
        host_bytes=TIGHT,
    )  # fmt: skip
