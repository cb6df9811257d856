"""How many rows at once where the caller does not say; blocks that cannot fit, refused before."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

import offload.calibrate
import offload.rowchoice
from offload.blockroom import block_cost, least_frames_bytes
from offload.errors import BudgetError
from offload.places import BlockPlan
from offload.tiers.spec import KIB, Compute
from tests.test_throughput import PROMPTS, build, prompts, tight_bytes

if TYPE_CHECKING:
    from offload.run import Runtime
    from tests.conftest import Manager

READING = Compute(((1, 1e-13), (64, 2e-13)), 1e12)  # hardly anything but the disk takes time
COMPUTING = Compute(((1, 1e-6), (64, 64e-6)), 1e12)  # each token of each row takes its own time


def fixed_rates(monkeypatch: pytest.MonkeyPatch, compute: Compute | None) -> None:
    """What was measured before, of every model; None: nothing."""
    monkeypatch.setattr(offload.calibrate, "kept_calibration", lambda *_: compute)


def tight(manage: Manager, model: Any, plan: BlockPlan) -> Runtime:
    return manage(model, host_bytes=tight_bytes(model, plan, 8))


def test_rows_come_from_the_search_where_rates_are_known(
    manage: Manager, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {}
    for name, compute in (("reading", READING), ("computing", COMPUTING)):
        fixed_rates(monkeypatch, compute)
        run = tight(manage, build("llama"), BlockPlan(1))
        found = run.generate(prompts(), 8)
        told = run.stats()["generate"]
        assert told["chosen_by"] == "search"
        rows[name] = told["batch"] * told["micro_batches"]
        assert told["predicted_tokens_per_s"] > 0
        assert told["binding"] == {"reading": "disk", "computing": "host"}[name]
        said = f"at most {told['micro_batches']} micro-batches of {told['batch']} rows at once"
        assert said in capsys.readouterr().err
        assert len(found) == PROMPTS
    assert rows["reading"] > 2 * rows["computing"]


@pytest.mark.parametrize(
    ("why", "how"),
    [
        ("there is one", {"count": 1}),
        ("no weight leaves memory", {"disk": False, "host_bytes": 8192 * KIB}),
        ("no weight has to leave memory", {"host_bytes": 8192 * KIB}),
        ("keys and values have a memory of their own", {"kv_memory": 200 * KIB}),
        ("too short a run to measure for", {}),
    ],
)
def test_elsewhere_as_many_as_fit_and_it_is_said_why(
    manage: Manager, monkeypatch: pytest.MonkeyPatch, why: str, how: dict[str, Any]
) -> None:
    fixed_rates(monkeypatch, None)
    model = build("llama")
    budget = {"host_bytes": tight_bytes(model, BlockPlan(4), 8) + how.get("kv_memory", 0)}
    run = manage(model, **budget | {k: how[k] for k in ("disk", "host_bytes") if k in how})
    run.generate(prompts(how.get("count", PROMPTS)), 4, kv_memory=how.get("kv_memory"))
    told = run.stats()["generate"]
    assert told["chosen_by"] == "room"
    assert why in told["why"]
    run.generate(prompts(), 2, plan=BlockPlan(2))
    assert run.stats()["generate"]["chosen_by"] == "caller"


def test_measuring_takes_its_memory_from_the_budget_and_no_random_numbers(
    manage: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed_rates(monkeypatch, None)
    monkeypatch.setattr(offload.rowchoice, "WORTH_S", 0.0)
    model = build("llama")
    run = tight(manage, model, BlockPlan(4))
    run.generate(prompts(), 2)
    assert "would need 1" in run.stats()["generate"]["why"]  # 100 MiB and more: not to be had
    monkeypatch.setattr(offload.rowchoice, "PROBE_BYTES", -512 * block_cost(model).token_bytes)
    ledger, taken = run.parts.engine.ledger, list[int]()

    def measure(*_: object) -> Compute:
        taken.append(ledger.other_bytes)
        torch.rand(3)
        return READING

    monkeypatch.setattr(offload.calibrate, "cached_calibration", measure)
    before = torch.get_rng_state()
    run.generate(prompts(), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert run.stats()["generate"]["chosen_by"] == "search"
    assert taken
    assert taken[0] > 100 * KIB
    assert ledger.peak_bytes <= ledger.budget_bytes
    assert ledger.other_bytes == 0


def test_a_block_beyond_the_budget_is_refused_before_anything_moves(manage: Manager) -> None:
    model, plan = build("llama"), BlockPlan(2, 3)
    lengths = [len(prompt) for prompt in prompts()]
    block_bytes = block_cost(model).of(plan, lengths, 8)
    probe = manage(build("llama"), host_bytes=8192 * KIB)
    least_bytes = least_frames_bytes(probe.model, probe.parts)
    run = manage(model, host_bytes=block_bytes + least_bytes - KIB)
    before = run.stats()
    with pytest.raises(BudgetError, match="block of rows") as refused:
        run.generate(prompts(), 8, plan=plan)
    text = str(refused.value)
    assert re.search(r"\d KiB for keys and values and [\d.]+ KiB for activations", text)
    assert "a smaller batch (BlockPlan(" in text
    assert "kv_memory" in text
    assert run.stats()["counters"] == before["counters"]
    assert run.parts.engine.ledger.other_bytes == 0
    fits = re.search(r"BlockPlan\((\d+), (\d+)\) fits", text)
    assert fits is not None
    smaller = BlockPlan(*map(int, fits.groups()))
    assert len(run.generate(prompts(), 8, plan=smaller)) == PROMPTS
    larger = manage(build("llama"), host_bytes=refused.value.smallest_bytes)
    assert len(larger.generate(prompts(), 8, plan=plan)) == PROMPTS
