"""What reading and computing take from each other: measured, kept, and measured again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload import api
from offload import calibrate as module
from offload.config import Tuning
from offload.place import Place
from offload.prefetch.generation import Rates, RowCost, Shape, Weights, Workload
from offload.prefetch.search import Candidate, Problem, lane_lines, policy_of
from offload.shape import read_config
from offload.tiers import drag_probe
from offload.tiers.disk import SpillFile
from offload.tiers.drag_probe import beside_share, contention, costs
from offload.tiers.spec import MIB, Budget, Compute, Machine

MACHINE = Machine(2e9, 4e9, 1e9, 1e9, 1e10)
FOUND = Compute(((1, 2e-10),), 5e9, drag=0.3, disk_drag=0.1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe of milliseconds."""
    monkeypatch.setattr(drag_probe, "ALONE_S", 0.005)
    monkeypatch.setattr(drag_probe, "BESIDE_S", 0.02)
    monkeypatch.setattr(drag_probe, "PAUSE_S", 0.005)
    monkeypatch.setattr(drag_probe, "FILE_BYTES", 32 * MIB)


@pytest.fixture
def half_pace(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Work, beside which reads take twice as long."""
    monkeypatch.setattr(drag_probe, "FILE_BYTES", 32 * MIB)
    monkeypatch.setattr(drag_probe, "ALONE_S", 0.2)
    working = threading.Event()

    def read(*_: object) -> int:
        time.sleep(0.04 if working.is_set() else 0.02)
        return 0

    def work() -> None:
        working.set()
        time.sleep(0.1)
        working.clear()

    monkeypatch.setattr(SpillFile, "read", read)
    return work


@pytest.mark.parametrize(
    ("together_s", "work_s", "read_s", "found"),
    [
        (1.0, 0.8, 0.9, (0.2 / 0.9, 0.1 / 0.8)),
        (1.0, 1.1, 1.2, (0.0, 0.0)),  # faster than alone: the lone rates were of a worse hour
        (1.0, 0.5, 0.1, (5.0, 1.0)),  # a disk that hardly gets to read
    ],
)
def test_costs_are_what_was_lost(
    together_s: float, work_s: float, read_s: float, found: tuple[float, float]
) -> None:
    assert costs(together_s, work_s, read_s) == pytest.approx(found)


@pytest.mark.parametrize(("work_s", "read_s"), [(0.8, 0.9), (0.9, 0.5), (0.6, 0.7)])
def test_the_formula_gives_back_what_was_measured(work_s: float, read_s: float) -> None:
    """A pass that reads and computes as much as the probe did takes as long as the probe did."""
    drag, disk_drag = costs(1.0, work_s, read_s)
    weights = Weights(1, 1000, 1, 0, 0, 0, 1000)
    machine = Machine(1000 / read_s, 4e9, 1e9, 1e9, 1e10)
    rates = Rates(machine, Compute(((1, work_s),), 1.0, drag, disk_drag))
    asked = Problem(Shape(weights, RowCost(0, 0, 0, 0, 0)), rates, Budget(10**6), Workload(1, 1, 2))
    shares = np.array([0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0])  # all weights on disk
    lanes = lane_lines(asked, Candidate(1, 1), prefill=False)
    assert lanes["disk"][2] == pytest.approx(read_s)
    assert policy_of(asked, Candidate(1, 1), shares).times.pass_s == pytest.approx(1.0)


@pytest.mark.usefixtures("quick")
def test_reading_goes_on_beside_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offsets: set[int] = set()
    real = SpillFile.read

    def read(disk: Any, address: int, size_bytes: int, offset: int) -> int:
        offsets.add(offset)
        assert offset + size_bytes <= disk.used_bytes
        return real(disk, address, size_bytes, offset)

    monkeypatch.setattr(SpillFile, "read", read)
    drag, disk_drag = contention(lambda: sum(range(10_000)), tmp_path)
    assert drag >= 0
    assert 0 <= disk_drag <= 1
    assert offsets  # read at all, and checksummed
    assert list(tmp_path.iterdir()) == []


def test_the_lone_rate_of_the_disk_is_of_the_same_moment(
    tmp_path: Path, half_pace: Callable[[], None]
) -> None:
    """A disk at half its pace beside the work, whatever that pace is."""
    _, disk_drag = contention(half_pace, tmp_path)
    assert 0.3 < disk_drag < 0.7


def test_the_disk_keeps_the_share_that_it_has_beside_products(
    tmp_path: Path, half_pace: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads that take twice as long while products are computed."""
    monkeypatch.setattr(drag_probe, "_products", lambda: half_pace)
    assert 0.4 < beside_share(tmp_path) < 0.7


@pytest.mark.parametrize(("device", "share"), [("cpu", 0.7), ("cuda", 1.0)])
def test_a_gpu_that_computes_takes_nothing_from_the_disk(device: str, share: float) -> None:
    measured = replace(MACHINE, beside_share=0.7)
    place = Place(torch.device(device), None, own_memory=True)
    given: Any = SimpleNamespace(disk=Path(), place=place)
    found = api._machine(given, Tuning(machine=measured))
    assert found == replace(measured, beside_share=share)


@pytest.mark.usefixtures("quick")
def test_a_share_is_of_a_whole(tmp_path: Path) -> None:
    """Real reads beside real products; never more than alone."""
    assert 0.0 < beside_share(tmp_path) <= 1.0


@pytest.mark.usefixtures("quick")
def test_a_failed_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> int:
        raise OSError(5, "broken")

    monkeypatch.setattr(SpillFile, "read", read)
    with pytest.raises(OSError, match="broken"):
        contention(lambda: None, tmp_path)


def test_a_model_and_the_file_it_came_from_are_calibrated_once(tmp_path: Path) -> None:
    sizes: Any = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    }  # fmt: skip

    def kept_at(config: Any, weight_dtype: str | None = None) -> Path:
        return module._kept_at(config, weight_dtype, tmp_path, MACHINE)

    bare = LlamaConfig(vocab_size=50, eos_token_id=None, **sizes)
    asked_first = kept_at(bare)
    assert asked_first == kept_at(LlamaConfig(dtype="float32", eos_token_id=None, **sizes))
    LlamaForCausalLM(bare).save_pretrained(tmp_path)  # which writes more into the configuration
    read = read_config(str(tmp_path))
    assert asked_first == kept_at(read) == kept_at(LlamaForCausalLM(read).config)
    wider = LlamaConfig(**sizes | {"hidden_size": 128})
    halved = LlamaConfig(dtype="bfloat16", **sizes)
    others = [kept_at(wider), kept_at(halved), kept_at(read, "int4"), kept_at(read)]
    assert len(set(others)) == 4


@pytest.mark.parametrize("missing", ["drag", "disk_drag", "handling_s", "pass_s"])
def test_a_calibration_that_lacks_them_is_measured_again(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured: list[Machine] = []

    def measure(_config: Any, _dtype: str | None, _folder: Path, machine: Machine) -> Compute:
        measured.append(machine)
        return FOUND

    monkeypatch.setattr(module, "calibrate", measure)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    config = read_config(str(tmp_path))

    def ask(machine: Machine) -> int:
        assert module.cached_calibration(config, None, tmp_path, machine) == FOUND
        return len(measured)

    assert [ask(MACHINE), ask(MACHINE)] == [1, 1]
    (kept,) = (tmp_path / "cache" / "offload").iterdir()
    old = json.loads(kept.read_text())
    del old[missing]
    kept.write_text(json.dumps(old))
    assert [ask(MACHINE), ask(MACHINE)] == [2, 2]
    other = Machine(3e9, 4e9, 1e9, 1e9, 1e10)  # the unit of both costs is another one
    assert [ask(other), ask(other)] == [3, 3]
