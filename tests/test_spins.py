"""A thread is parked while chunks move, and only then, and not where the user has decided."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import offload
from offload.spins import ShortSpins
from offload.steps import Kind
from tests.conftest import MACHINE


def parked() -> int:
    return sum(t.name == "offload-spins" for t in threading.enumerate())


def tasks() -> int:
    return len(os.listdir("/proc/self/task"))


def until(there: int) -> bool:
    """Whether so many are parked, soon."""
    end_s = time.monotonic() + 5
    while parked() != there and time.monotonic() < end_s:
        time.sleep(0.001)
    return parked() == there


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_a_parked_thread_has_a_team_of_its_own_until_it_goes() -> None:
    spins, before = ShortSpins(), tasks()
    spins.want(True)
    spins.want(True)
    assert spins.on
    assert until(1)
    end_s = time.monotonic() + 5
    while tasks() < before + 2 and time.monotonic() < end_s:  # itself, and who computes with it
        time.sleep(0.001)
    assert tasks() >= before + 2
    spins.want(False)
    assert not spins.on
    assert until(0)


@pytest.mark.usefixtures("two_threads")
def test_it_goes_with_a_run_that_nobody_closed() -> None:
    spins = ShortSpins()
    spins.want(True)
    assert until(1)
    del spins
    gc.collect()
    assert until(0)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_says_of_spinning_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    spins = ShortSpins()
    spins.want(True)
    assert not spins.on


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("budget", "moves"), [("3MiB", True), ("64MiB", False)])
def test_it_is_there_while_plans_move_chunks(
    budget: str, moves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.api.cached_probe", lambda folder: MACHINE)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    offload.wrap(model, optimizer, host_memory=budget, disk=tmp_path)
    run = offload.runtime(model)
    for _ in range(5):
        model(torch.ones(2, 256)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool(run.stats()["forecast"]["read_bytes"]) is moves
    assert run.parts.spins.on is moves
    run.close()
    assert not run.parts.spins.on
    assert until(0)


@pytest.mark.usefixtures("two_threads")
def test_an_evaluation_that_fits_does_not_decide_for_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload.api.cached_probe", lambda folder: MACHINE)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters())
    offload.wrap(model, optimizer, host_memory="6MiB", disk=tmp_path)
    run = offload.runtime(model)

    def steps(count: int) -> bool:
        for _ in range(count):
            model(torch.ones(2, 256)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return run.parts.spins.on

    assert steps(12)
    for _ in range(4):
        with torch.no_grad():
            model(torch.ones(2, 256))
    evaluation = run.parts.steps.tracks[Kind.INFER].forecast
    assert evaluation is not None
    assert evaluation.moved_bytes == 0
    assert not run.parts.spins.on
    assert steps(1)
    run.close()


def test_one_thread_spins_for_nobody() -> None:
    spins = ShortSpins()
    spins.want(True)
    assert not spins.on
