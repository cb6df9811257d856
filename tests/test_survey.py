"""``offload probe``: lanes alone and beside each other, kept for the planner."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import offload
from offload import cli
from offload.bind import Home
from offload.engine import Engine
from offload.homing import adopt_parameter
from offload.tiers import probe, survey
from offload.tiers.disk import SpillFile
from offload.tiers.spec import MIB, Machine

MACHINE = Machine(2e9, 4e9, 1e9, 1.5e9, 1e10)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A probe of milliseconds, of a folder, whose result is kept beside it."""
    for name, value in (
        ("COPY_BYTES", MIB), ("UPDATE_PARAMS", 1 << 12), ("PRODUCT_SIDE", 32), ("ROUNDS", 1),
    ):  # fmt: skip
        monkeypatch.setattr(survey, name, value)
    monkeypatch.setattr(survey.rates, "__defaults__", (0.01,))
    monkeypatch.setattr(probe, "probe_machine", lambda folder: MACHINE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """``offload probe ARGUMENTS`` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["offload", "probe", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_everything_is_measured_printed_and_kept(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--disk", str(small), "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["machine"] == MACHINE.to_dict()
    pairs = {tuple(pair["lanes"]): pair for pair in said["pairs"]}
    assert list(pairs) == [("disk read", "disk write"), ("memory copy", "update")]
    assert pairs["disk read", "disk write"]["beside_per_s"] == [1e9, 1.5e9]
    assert all(v > 0 for v in pairs["memory copy", "update"]["alone_per_s"])
    assert all(v > 0 for v in pairs["memory copy", "update"]["beside_per_s"])
    assert said["product_flops_per_s"] > 0
    kept = Path(said.pop("kept_in"))
    assert json.loads(kept.read_text()) == said
    monkeypatch.setattr(probe, "probe_machine", lambda folder: pytest.fail("it was kept"))
    assert probe.cached_probe(small) == MACHINE

    monkeypatch.setattr(probe, "probe_machine", lambda folder: MACHINE)
    config = small / "run.yaml"
    config.write_text(f"memory:\n  disk: {small}\n")
    assert run(monkeypatch, "--config", str(config)) == 0
    words = capsys.readouterr().out
    for part in ("disk write", "1.50 GB/s (38%)", "M params/s", "GFLOP/s", str(kept.name)):
        assert part in words.replace("\n", "")
    assert run(monkeypatch, "--disk", str(small), "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_what_another_version_kept_is_measured_again(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that is not known is not taken for a whole."""
    old = MACHINE.to_dict()
    del old["beside_share"]
    probe.keep(probe.remembered_at(small), old)
    found = replace(MACHINE, beside_share=0.6)
    monkeypatch.setattr(probe, "probe_machine", lambda folder: found)
    assert probe.cached_probe(small) == found
    monkeypatch.setattr(probe, "probe_machine", lambda folder: pytest.fail("it was kept"))
    assert probe.cached_probe(small) == found


def test_a_first_run_measures_before_its_budget_is_full(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What measuring holds is in no account: it must not come on top of a model."""
    order: list[str] = []

    def adopt(engine: Engine, home: Home) -> None:
        order.append(home.name)
        adopt_parameter(engine, home)

    def measure(folder: Path) -> Machine:
        order.append("measured")
        return MACHINE

    monkeypatch.setattr("offload.api.adopt_parameter", adopt)
    monkeypatch.setattr(probe, "probe_machine", measure)
    model = nn.Linear(64, 64)
    offload.wrap(model, None, host_memory="8MiB", disk=small)
    offload.runtime(model).close()
    assert order == ["measured", "weight", "bias"]


def test_a_dry_run_measures_and_keeps_nothing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(survey, "survey", lambda folder: pytest.fail("measured"))
    assert run(monkeypatch, "--disk", str(small / "new"), "--dry-run") == 0
    assert f"in {small / 'new'}" in capsys.readouterr().out
    assert [p.name for p in tmp_path.rglob("*")] == ["disk"]
    (small / "file").touch()
    assert run(monkeypatch, "--disk", str(small / "file"), "--dry-run") == 2
    assert "choose another --disk" in capsys.readouterr().err


def test_rates_are_of_each_work_while_all_are_repeated() -> None:
    def work(amount: float, seconds: float) -> survey.Work:
        def once() -> float:
            time.sleep(seconds)
            return amount

        return once

    slow, fast = survey.rates([work(1.0, 0.004), work(100.0, 0.001)], 0.05)
    assert 0 < slow <= 1.0 / 0.004  # never more than there can be, however busy the machine
    assert 0 < fast <= 100.0 / 0.001


def test_the_disk_is_measured_with_more_memory_than_a_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: dict[str, set[int]] = {"pull": set(), "push": set()}
    for name, addresses in used.items():
        monkeypatch.setattr(
            SpillFile, name, lambda _disk, address, *_, seen=addresses: seen.add(address)
        )
    probe.probe(tmp_path, 256 * MIB, rounds=1)
    for addresses in used.values():
        assert len(addresses) * probe.BLOCK_BYTES == probe.MEMORY_BYTES >= 96 * MIB
