"""Every planned step knows its limit: with and without a disk, and where frames are computed with.

What is slow is made slow on purpose, by sleeping many times what anything else takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload import limits
from offload.config import Tuning
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.prefetch.variants import Saving
from offload.report import report_data
from offload.run import Runtime
from offload.steps import Kind
from offload.tiers.copy import PlainCopier
from offload.tiers.disk import SpillFile
from offload.tiers.spec import Machine
from tests.test_gpu_promises import MACHINE, mlp

NAP_S = 0.01


class Lazy(torch.optim.SGD):
    """Sleeps before each piece of the update."""

    def step(self, closure: Any = None) -> Any:
        time.sleep(NAP_S)
        return super().step(closure)


class LazyLayer(nn.Module):
    """Sleeps in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(10 * NAP_S)
        return x


def train(
    disk: Path | None, device: str | None, model: nn.Module | None = None, steps: int = 5,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, machine: Machine = MACHINE,
) -> Runtime:  # fmt: skip
    """Some steps of a small model, which a disk's memory and a device hold in part."""
    model = model or mlp()
    made = optimizer(model.parameters(), lr=1e-2)
    tuning = Tuning(device_chunk_bytes=80 * 1024, chunk_bytes=64 * 1024, machine=machine,
                    residents=False)  # fmt: skip
    where: dict[str, Any] = {"device": device, "device_memory": "300KiB"} if device else {}
    where |= {"host_memory": "560KiB" if disk else "8MiB", "disk": disk}
    offload.wrap(model, made, tuning=tuning, **where)
    for _ in range(steps):
        model(torch.ones(8, 128)).square().mean().backward()
        made.step()
        made.zero_grad()
    return offload.runtime(model)


def check(run: Runtime, binding: str) -> dict[str, Any]:
    """What stats say, and that the report says the same."""
    stats, data = run.stats(), report_data(run)
    assert 0 < stats["wire_bound_s"] <= stats["bound_s"]
    assert stats["binding"] == data["verdict"]["binding"] == binding
    for key in ("bound_s", "wire_bound_s", "binding"):
        assert data["step"][key] == stats[key]
    run.close()
    return stats


def napping(times: int, work: Callable[..., Any]) -> Callable[..., Any]:
    def late(*args: Any) -> Any:
        time.sleep(times * NAP_S)
        return work(*args)

    return late


@pytest.mark.parametrize("device", [None, "emulated"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["host", "disk"])
def test_the_update_is_part_of_every_bound(
    on_disk: bool, device: str | None, tmp_path: Path
) -> None:
    run = train(tmp_path if on_disk else None, device, optimizer=Lazy)
    stats = check(run, "update" if device else "compute")
    assert stats["bound_s"] > NAP_S


def test_on_the_host_alone_a_step_is_its_computing() -> None:
    run = train(None, None, nn.Sequential(mlp(), LazyLayer()))
    track = run.parts.steps.tracks[Kind.TRAIN]
    assert track.fits
    stats = check(run, "compute")
    assert 10 * NAP_S < stats["bound_s"] <= stats["step_s"]
    assert stats["forecast"]["read_bytes"] == stats["forecast"]["write_bytes"] == 0


@pytest.mark.parametrize("way", ["upload", "download"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["host", "disk"])
def test_a_slow_bus_binds_and_is_not_taken_for_computing(
    on_disk: bool, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = napping(3, getattr(PlainCopier, way))
    monkeypatch.setattr(PlainCopier, way, slow)
    run = train(tmp_path if on_disk else None, "emulated")
    naps = 3 * 12  # of six layers in both passes; of their twelve gradients
    device = run.parts.device
    assert device is not None
    trace = device.steps.tracks[Kind.TRAIN].trace
    assert trace is not None
    assert sum(m.compute_s for m in trace.moments) < naps * NAP_S / 2
    stats = check(run, "link")
    assert stats["bound_s"] > 0.9 * naps * NAP_S
    if way == "download":
        assert device.engine.counters.stall_s["download"] > 0.9 * naps * NAP_S


def test_computing_on_the_device_binds(tmp_path: Path) -> None:
    run = train(tmp_path, "emulated", nn.Sequential(mlp(), LazyLayer()))
    stats = check(run, "compute")
    assert stats["bound_s"] > 10 * NAP_S


def test_a_slow_disk_below_frames_binds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the device waits for it is no computing of the device's."""
    monkeypatch.setattr(SpillFile, "push", napping(12, SpillFile.push))
    run = train(tmp_path, "emulated", machine=replace(MACHINE, write_bytes_per_s=1.6e6))
    device = run.parts.device
    assert device is not None
    trace = device.steps.tracks[Kind.TRAIN].trace
    assert trace is not None
    host_s = run.parts.engine.counters.stalled_s(below=False) / run.stats()["steps"]
    assert sum(m.compute_s for m in trace.moments) < host_s / 2
    check(run, "disk")


def test_inference_in_frames_has_a_bound_for_each_form(tmp_path: Path) -> None:
    model = mlp()
    tuning = Tuning(device_chunk_bytes=80 * 1024, machine=MACHINE)
    offload.wrap(
        model, device="emulated", device_memory="300KiB", host_memory="8MiB", tuning=tuning
    )
    with torch.no_grad():
        for _ in range(4):
            model(torch.ones(8, 128))
    stats = offload.runtime(model).stats()
    assert stats["bound_s"] > 0
    (form,) = stats["forms"].values()
    assert form["bound_s"] == stats["bound_s"]
    offload.runtime(model).close()


@pytest.mark.parametrize("lacking_bytes", [None, -4096, 0, 4096])
def test_more_device_memory_is_proposed_only_where_some_is_lacking(
    lacking_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = Trace((Moment(Phase.FORWARD, (Need(0, Access.READ),), 1.0, 0),), (1,), {})
    track = SimpleNamespace(trace=trace)
    residents = SimpleNamespace(kind=Kind.TRAIN, lacking_bytes=lambda _: lacking_bytes)
    device = SimpleNamespace(residents=residents, steps=SimpleNamespace(tracks={Kind.TRAIN: track}))
    parts: Any = SimpleNamespace(device=device)
    monkeypatch.setattr(limits, "limit_of", lambda *_: SimpleNamespace(bound_s=3.0))
    found = limits.more_device_memory(parts, Kind.TRAIN)
    assert (found is not None) is (lacking_bytes == 4096)
    assert found in (None, Saving(4096, 1.0, 2.0))
