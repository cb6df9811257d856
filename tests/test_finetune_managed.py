"""The fine-tuning loop over the real engine, with less memory than it would like."""

from __future__ import annotations

import signal
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.config import Tuning
from offload.finetune import OffloadEngine, finetune
from offload.metrics import StepReport
from offload.progress import PlainProgress
from offload.run import Runtime
from offload.runconfig import MemoryConfig, RunConfig
from offload.tiers.spec import Machine
from tests.tiny import tiny_run, write_tiny_model

TUNING = Tuning(
    chunk_bytes=16384, machine=Machine(2e9, 2e9, 1e9, 1e9, 8e9), poison=True, keep_hooks=True
)


class Losses(PlainProgress):
    """Keeps what it is told, and presses Ctrl-C during a given step."""

    def __init__(self, stop_at: int) -> None:
        super().__init__(StringIO())
        self.seen: list[tuple[float, float | None]] = []
        self._stop_at = stop_at

    def step(self, report: StepReport) -> None:
        self.seen.append((report.loss, report.eval_loss))
        if report.step == self._stop_at:
            signal.raise_signal(signal.SIGINT)


class Watched(OffloadEngine):
    """Remembers whether the update came early, which a closed run does not tell."""

    def __init__(self) -> None:
        super().__init__(TUNING)
        self.runs: list[Runtime] = []

    def wrap(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig
    ) -> Any:
        self.runs.append(super().wrap(model, optimizer, config))  # type: ignore[arg-type]
        return self.runs[-1]

    @property
    def early(self) -> bool:
        early = self.runs[-1].parts.early
        return early is not None and early.active


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    made = tiny_run(write_tiny_model(tmp_path / "model"), tmp_path)
    memory = MemoryConfig(host_memory="1MiB", disk=str(tmp_path / "spill"))
    return replace(made, memory=memory, optimizer=replace(made.optimizer, max_grad_norm=0.0))


def _run(
    config: RunConfig, name: str, *, resume: bool = False, stop_at: int = -1, **how: Any
) -> tuple[list[tuple[float, float | None]], bool]:
    """Losses, and whether updates came early."""
    told = replace(config.optimizer, **how)
    losses, engine = Losses(stop_at), Watched()
    config = replace(config, optimizer=told, output=f"{config.output}-{name}")
    finetune(config, resume=resume, observer=losses, engine=engine)
    assert engine.runs[-1].stats()["counters"]["evictions"] > 0
    return losses.seen, engine.early


def test_update_in_the_backward_pass_has_the_same_losses(config: RunConfig) -> None:
    plain, early = _run(config, "plain")
    assert not early
    other, early = _run(config, "early", step_in_backward=True)
    assert early
    assert other == plain
    assert len(plain) == config.schedule.steps


def test_with_clipping_it_says_that_the_update_waits(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, _ = _run(config, "plain", max_grad_norm=0.5)
    assert "step_in_backward" not in capsys.readouterr().err
    other, early = _run(config, "early", max_grad_norm=0.5, step_in_backward=True)
    assert "with max_grad_norm the update waits for the norm" in capsys.readouterr().err
    assert not early
    assert other == plain


def test_it_may_change_on_resume(config: RunConfig) -> None:
    whole, _ = _run(config, "whole")
    first, _ = _run(config, "parts", stop_at=3)
    second, early = _run(config, "parts", resume=True, step_in_backward=True)
    assert early
    assert first + second == whole
