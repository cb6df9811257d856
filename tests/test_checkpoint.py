"""A checkpoint is whole or not there, and a run goes on from it with the same bits."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

import offload
from offload.config import Tuning
from offload.errors import CheckpointError
from offload.run import Runtime
from offload.steps import Kind
from offload.tiers.spec import Machine

MACHINE = Machine(1.8e9, 5.5e9, 1.4e9, 1.4e9, 1e10)
BUDGET = "768KiB"
WIDTH, DEPTH, VOCABULARY = 96, 4, 200

Trained = tuple[Runtime, Any, Path]
MakeOptimizer = Callable[[nn.Module], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True, amsgrad=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
}


class Net(nn.Module):
    """Embedding, blocks with dropout, buffers, a channels-last convolution: 2 MiB trained."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 3 * width), nn.Dropout(0.1), nn.Linear(3 * width, width))
            for _ in range(DEPTH)
        )
        self.conv = nn.Conv2d(3, 64, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, VOCABULARY)
        self.frozen = nn.Parameter(torch.randn(width, width), requires_grad=False)
        self.register_buffer("fleeting", torch.ones(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:  # [batch] -> [batch, vocabulary]
        x = self.embed(ids) @ self.frozen * 0.1
        for block in self.blocks:
            x = x + block(x)
        picture = x[:, :75].reshape(-1, 3, 5, 5)
        x = x + self.conv(picture).mean((1, 2, 3))[:, None]
        logits: Tensor = self.head(self.norm(x))
        return logits


def fresh(
    make: MakeOptimizer, folder: Path, *, seed: int = 0, budget: str = BUDGET, width: int = WIDTH
) -> tuple[Runtime, Any]:
    torch.manual_seed(seed)
    model = Net(width)
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    offload.wrap(
        model, optimizer, host_memory=budget, disk=folder,
        tuning=Tuning(chunk_bytes=65536, machine=MACHINE, poison=True),
    )  # fmt: skip
    return offload.runtime(model), scheduler


def train(run: Runtime, scheduler: Any, steps: int = 3) -> list[float]:
    losses = []
    assert run.optimizer is not None
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (16,))
        loss = nn.functional.cross_entropy(run.model(ids), ids.roll(1))
        torch.autograd.backward(loss)
        run.optimizer.step()
        scheduler.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def snapshot(run: Runtime) -> dict[str, Tensor]:
    """Copies of all weights, buffers and state."""
    found = {k: v.detach().clone() for k, v in run.model.state_dict().items()}
    names: dict[Tensor, str] = {p: k for k, p in run.model.named_parameters()}
    for p, entries in (run.optimizer.state if run.optimizer else {}).items():
        found |= {f"{names[p]}::{k}": v.clone() for k, v in entries.items() if hasattr(v, "clone")}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    return tmp_path / "spill"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A run after three steps, and its checkpoint."""
    folder = tmp_path_factory.mktemp("shared")
    run, scheduler = fresh(OPTIMIZERS["adamw"], folder / "spill")
    train(run, scheduler)
    run.save(folder / "point", scheduler)
    yield run, scheduler, folder / "point"
    run.close()


@pytest.fixture
def trained(shared: Trained, tmp_path: Path) -> Trained:
    """The same, with the run as at its checkpoint, and a copy of that to play with."""
    run, scheduler, point = shared
    run.load(point, scheduler)
    return run, scheduler, Path(shutil.copytree(point, tmp_path / "point"))


# -- going on -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_bit_exact(kind: str, tmp_path: Path, spill: Path) -> None:
    run, scheduler = fresh(OPTIMIZERS[kind], spill)
    train(run, scheduler)
    before = run.parts.engine.counters.evictions
    run.save(tmp_path / "point", scheduler, {"step": 3})
    assert run.parts.engine.counters.evictions > before  # it did not fit, and was streamed
    losses = train(run, scheduler)
    rates = [g["lr"] for g in run.optimizer.param_groups] if run.optimizer else []
    expected = snapshot(run)
    draws = torch.rand(3), random.random(), np.random.rand()
    run.close()

    again, scheduler = fresh(OPTIMIZERS[kind], spill, seed=1)
    assert again.load(tmp_path / "point", scheduler) == {"step": 3}
    assert train(again, scheduler) == losses
    assert again.optimizer is not None
    assert [g["lr"] for g in again.optimizer.param_groups] == rates
    assert same(snapshot(again), expected)
    torch.testing.assert_close(
        (torch.rand(3), random.random(), np.random.rand()), draws, rtol=0, atol=0
    )
    host = again.stats()["tiers"]["host"]
    assert host["peak_bytes"] <= host["budget_bytes"]
    again.close()


def test_state_lives_in_its_homes_after_load(trained: Trained, spill: Path) -> None:
    _, _, point = trained
    again, scheduler = fresh(OPTIMIZERS["adamw"], spill, seed=1)
    again.load(point, scheduler)
    space = again.parts.engine.space
    assert again.optimizer is not None
    for entries in again.optimizer.state.values():
        assert entries["step"].shape == ()
        for name in ("exp_avg", "exp_avg_sq"):
            assert space.chunks_at(entries[name].data_ptr(), 4)
    again.close()


def test_going_back_in_the_same_run(trained: Trained) -> None:
    run, scheduler, point = trained
    losses = train(run, scheduler)
    run.load(point, scheduler)
    assert train(run, scheduler) == losses


def test_a_graph_from_before_loading_knows_that_weights_changed(trained: Trained) -> None:
    run, scheduler, point = trained
    before = [p._version for p in run.model.parameters()]
    run.load(point, scheduler)
    assert all(p._version > v for p, v in zip(run.model.parameters(), before, strict=True))


def test_another_budget_and_no_disk(trained: Trained, spill: Path) -> None:
    run, scheduler, point = trained
    losses = train(run, scheduler)
    torch.manual_seed(5)
    model = Net()
    optimizer = OPTIMIZERS["adamw"](model)
    offload.wrap(model, optimizer, host_memory="64MiB")
    roomy = offload.runtime(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    roomy.load(point, scheduler)
    assert train(roomy, scheduler) == losses
    roomy.save(point.with_name("roomy"), scheduler)
    roomy.close()


def test_weights_alone_for_a_run_without_optimizer(trained: Trained, spill: Path) -> None:
    run, _, point = trained
    model = Net()
    offload.wrap(model, host_memory=BUDGET, disk=spill, tuning=Tuning(chunk_bytes=65536))
    reader = offload.runtime(model)
    with pytest.warns(UserWarning, match="scheduler"):
        reader.load(point)
    assert same(snapshot(reader), {k: v for k, v in snapshot(run).items() if "::" not in k})
    reader.close()


def test_files_are_plain_safetensors(trained: Trained) -> None:
    run, _, point = trained
    found: dict[str, Tensor] = {}
    for path in [*point.glob("weights-*"), *point.glob("optimizer-*")]:
        found |= load_file(path)
    assert same(found, snapshot(run))
    assert "embed.weight::exp_avg" in found
    assert "fleeting" not in found
    assert not [p for p in point.parent.iterdir() if p.name.startswith(".")]


class Counting(nn.Linear):
    """A module that keeps more than tensors."""

    calls = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls, "when": (1, 2.5)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["when"] == (1, 2.5)
        self.calls = state["calls"]


def test_what_modules_add_to_their_state(tmp_path: Path, spill: Path) -> None:
    model = nn.Sequential(Counting(64, 64), nn.Linear(64, 64))
    assert isinstance(model[0], Counting)
    model[0].calls = 7
    offload.wrap(model, host_memory="256KiB", disk=spill, tuning=Tuning(machine=MACHINE))
    with offload.runtime(model) as run:
        run.save(tmp_path / "a")
        model[0].calls = 0
        run.load(tmp_path / "a")
    assert model[0].calls == 7


def test_saving_in_mid_step_does_not_disturb_it(tmp_path: Path, spill: Path) -> None:
    def steps(save_at: tuple[int, ...]) -> tuple[list[float], list[object]]:
        run, scheduler = fresh(OPTIMIZERS["adamw"], spill)
        assert run.optimizer is not None
        losses = []
        for i in range(4):
            ids = torch.randint(0, VOCABULARY, (16,))
            loss = nn.functional.cross_entropy(run.model(ids), ids)
            if i in save_at:
                run.save(tmp_path / "a", scheduler)
            torch.autograd.backward(loss)
            if i in save_at:
                run.save(tmp_path / "a", scheduler)
            run.optimizer.step()
            run.optimizer.zero_grad()
            losses.append(loss.item())
        trace = run.parts.steps.tracks[Kind.TRAIN].trace
        run.close()
        return losses, [m.key for m in trace.moments] if trace else []

    assert steps(save_at=(0, 3)) == steps(save_at=())


def test_memory_of_save_and_load_is_within_the_budget(tmp_path: Path, spill: Path) -> None:
    run, scheduler = fresh(OPTIMIZERS["adamw"], spill)
    ledger = run.parts.engine.ledger
    train(run, scheduler, 1)
    for action in (
        lambda: run.save(tmp_path / "a", scheduler),
        lambda: run.load(tmp_path / "a", scheduler),
    ):
        ledger.peak_bytes = 0
        action()
        assert 0 < ledger.peak_bytes <= ledger.budget_bytes
        assert ledger.other_bytes == 0
    run.close()


# -- refusing -------------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "truncated": _shorten,
    "first byte": lambda p: _flip(p, 0),
    "middle": lambda p: _flip(p, p.stat().st_size // 2),
    "last byte": lambda p: _flip(p, -1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file",
    [
        "manifest.json", "run.json", "values.safetensors",
        "weights-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors",
    ],
)  # fmt: skip
def test_damage_is_found_before_anything_changes(trained: Trained, file: str, damage: str) -> None:
    run, scheduler, point = trained
    train(run, scheduler, 1)
    before = snapshot(run)
    DAMAGES[damage](point / file)
    with pytest.raises(CheckpointError, match=file):
        run.load(point, scheduler)
    assert same(snapshot(run), before)


def test_nothing_there(trained: Trained, tmp_path: Path) -> None:
    run, scheduler, _ = trained
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        run.load(tmp_path / "nowhere", scheduler)


def test_another_model_or_optimizer(trained: Trained, spill: Path) -> None:
    _, _, point = trained
    wide, scheduler = fresh(OPTIMIZERS["adamw"], spill, width=128)
    with pytest.raises(CheckpointError, match=r"embed\.weight|frozen") as caught:
        wide.load(point, scheduler)
    assert "[96, 96]" in str(caught.value) or "[200, 96]" in str(caught.value)
    wide.close()
    other, scheduler = fresh(OPTIMIZERS["sgd"], spill)
    with pytest.raises(CheckpointError, match=r"AdamW.*SGD"):
        other.load(point, scheduler)
    other.close()
    halved, scheduler = fresh(lambda m: torch.optim.AdamW(m.head.parameters()), spill)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="frozen is only in the checkpoint's"):
        halved.load(point, scheduler)
    halved.close()


def test_scheduler_that_was_not_saved(trained: Trained, tmp_path: Path) -> None:
    run, scheduler, _ = trained
    run.save(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no scheduler"):
        run.load(tmp_path / "bare", scheduler)


def test_foreign_directories_are_not_replaced(trained: Trained, tmp_path: Path) -> None:
    run, _, _ = trained
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="photos holds other files"):
        run.save(tmp_path / "photos")
    with pytest.raises(CheckpointError, match="is a file"):
        run.save(tmp_path / "file")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_what_cannot_be_saved_is_named(trained: Trained, tmp_path: Path) -> None:
    run, _, _ = trained
    with pytest.raises(CheckpointError, match=r"extra\.hook is a function"):
        run.save(tmp_path / "b", extra={"hook": lambda: None})
    assert not (tmp_path / "b").exists()
