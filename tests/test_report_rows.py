"""The report of a generation: memory by kind is what was taken for the rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from offload.places import BlockPlan
from offload.steps import Kind
from offload.tiers.spec import KIB, MIB
from tests.test_report import check, names
from tests.test_throughput import WORDS, build, prompts, tight_bytes
from tests.test_throughput_kv import build as build_kv
from tests.test_throughput_kv import prompts as prompts_kv

if TYPE_CHECKING:
    from tests.conftest import Manager


@pytest.mark.parametrize("kv_memory", [None, 400 * KIB])
def test_generating(manage: Manager, kv_memory: int | None) -> None:
    model = build("llama")
    plan = BlockPlan(2, 2)
    run = manage(model, host_bytes=tight_bytes(model, plan, 8) + (kv_memory or 0))
    taken = []
    run.generate(
        prompts(), 8, plan=plan, kv_memory=kv_memory,
        on_step=lambda _: taken.append(run.parts.engine.ledger.other_bytes),
    )  # fmt: skip
    data = check(run, Kind.INFER)
    assert data["task"] == "generate"
    longest = sorted(map(len, prompts()))[-plan.rows :]
    position_bytes = 2 * 3 * 2 * 12 * 4  # keys and values, layers, heads, dim, float32
    kv_bytes = kv_memory or (sum(longest) + 8 * plan.rows) * position_bytes
    kinds = data["step"]["memory"]["host"]["kinds"]
    assert set(kinds["kv"]) == {kv_bytes}
    # Beside them what the passes may take is all that was taken.
    assert set(kinds["activations"]) == {taken[-1] - kv_bytes}
    assert max(kinds["activations"]) > 4 * WORDS * plan.rows  # the logits alone
    assert names(data) == ["forward"]
    assert data["step"]["bound_s"] > 0
    assert not any("micro" in line or "state" in line for line in data["verdict"]["advice"])


def test_keys_and_values_on_disk_are_those_of_the_step(manage: Manager, tmp_path: Path) -> None:
    """Their file is empty when the rows have ended, and the report is asked for."""
    run = manage(build_kv(), host_bytes=MIB)
    disk = []
    run.generate(
        prompts_kv(6), 30, plan=BlockPlan(2, 3), kv_memory=370 * KIB,
        on_step=lambda _: disk.append(run.stats()["kv"]["disk_bytes"]),
    )  # fmt: skip
    assert run.stats()["kv"]["disk_bytes"] == 0
    memory = check(run, Kind.INFER)["step"]["memory"]["disk"]
    assert set(memory["kinds"]["kv"]) == {disk[-2]}
    assert disk[-2] > 0
    run.report(tmp_path / "x.html")
    assert "chart-memory-disk" in (tmp_path / "x.html").read_text()
