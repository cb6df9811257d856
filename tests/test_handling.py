"""What managing layers costs beside their products: measured, and counted by the search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload import calibrate as calibration
from offload import handling as module
from offload.config import Tuning
from offload.handling import Pass, beside, handling
from offload.plan_cli import choose
from offload.prefetch.generation import Rates, Workload
from offload.shape import model_of
from offload.tiers.spec import MIB, Compute
from tests.conftest import CHUNK_BYTES
from tests.test_plan_least import config
from tests.test_search import HOST, MACHINE, SHAPE, problem

LAYERS = SHAPE.weights.layers


def test_what_is_left_by_hand() -> None:
    """Of each pass 100 ms, 80 within layers; of these 10 waiting, 6 for reads, products 40."""
    passes = [Pass(0.100, 0.080, 0.010, 60, 0.040)] * 2 + [Pass(9.0, 0.1, 0.0, 0, 8.0)]
    found = beside(passes, layers=8, drag_s=1e-4)
    assert found.layer_s == pytest.approx(0.024 / 8)
    assert found.pass_s == pytest.approx(0.020)
    assert found.plain_s == pytest.approx(0.040)
    faster = [Pass(0.05, 0.03, 0.0, 0, 0.04)]  # products were timed in a worse moment
    assert beside(faster, 8, 0.0).layer_s == 0.0


def test_a_sample_is_managed_and_weights_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROOM_BYTES", 256 << 10)
    seen: list[Pass] = []

    def note(passes: list[Pass], layers: int, drag_s: float) -> Any:
        seen.extend(passes)
        assert layers == 12
        assert drag_s == pytest.approx(0.5 / MACHINE.read_bytes_per_s)
        return beside(passes, layers, drag_s)

    monkeypatch.setattr(module, "beside", note)
    asked = config()
    few = calibration.few_layers(asked, 12)
    tuning = Tuning(chunk_bytes=4 * CHUNK_BYTES, machine=MACHINE, keep_hooks=True)
    found = handling(
        model_of(few, "float32").eval(), lambda: model_of(few, "float32").eval(),
        lambda m: calibration._run(m, 1), tmp_path, tuning, drag=0.5,
    )  # fmt: skip
    assert module.LEAST <= len(seen) <= module.MOST
    assert min(p.read_bytes for p in seen) > 0
    assert all(p.step_s > p.layers_s > p.stall_s >= 0 for p in seen)
    assert found == beside(seen, 12, 0.5 / MACHINE.read_bytes_per_s)
    assert list(tmp_path.iterdir()) == []


def times(compute: Compute, host_mib: int) -> Any:
    """Of what is chosen with these rates."""
    asked = problem(host_mib * MIB, rates=Rates(MACHINE, compute), work=Workload(1, 32, 32))
    return choose(asked).times


def test_a_pass_pays_for_layers_whose_weights_come_and_go() -> None:
    computing = replace(HOST, product_s=((1, 1e-9), (64, 64e-9)))
    managed = replace(computing, handling_s=0.5, pass_s=1.0)
    plain, dearer = (times(compute, 80) for compute in (computing, managed))
    assert plain.binding == "host"
    added_s = dearer.pass_s - plain.pass_s
    assert added_s == pytest.approx(1.0 + LAYERS * 0.5, rel=0.05)
    assert dearer.bound_s <= plain.bound_s * (1 + 1e-6)  # a bound knows products and bytes alone
    plain, dearer = (times(compute, 900) for compute in (computing, managed))
    assert dearer.pass_s - plain.pass_s == pytest.approx(1.0)  # hooks come off
