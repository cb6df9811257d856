"""Which changes are named, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.advise import advise, site_of_variant
from offload.blueprint import FineTune
from offload.forecast import Forecaster
from offload.machines import Processor, Site
from offload.prefetch.advice import Change, Cost, Outcome, rank
from offload.tiers.spec import GIB, MIB, Budget
from tests.conftest import MACHINE
from tests.test_synthesis import llama

JOB = FineTune(batch=2, sequence=16)
SITE = Site("here", MACHINE, Processor(1e10, 1e10, 1e10), MIB)
NOW = Outcome(True, 100.0, 1000.0)
NOT_NOW = Outcome(False, 0.0, 0.0)


def change(what: str, cost: Cost, tokens_per_s: float, written: float = 1000.0) -> Change:
    return Change(what, cost, Outcome(tokens_per_s > 0, tokens_per_s, written))


def test_the_cheapest_come_first_and_of_one_cost_the_fastest() -> None:
    changes = [
        change("memory", Cost.HARDWARE, 300.0),
        change("bf16", Cost.NUMBERS, 150.0),
        change("int8", Cost.NUMBERS, 200.0),
        change("backward", Cost.NONE, 120.0),
    ]
    assert [c.what for c in rank(NOW, changes)] == ["backward", "int8", "bf16", "memory"]


@pytest.mark.parametrize(
    ("tokens_per_s", "written", "named"),
    [(102.0, 1000.0, False), (104.0, 1000.0, True), (99.0, 800.0, True), (99.0, 950.0, False),
     (90.0, 100.0, False), (0.0, 0.0, False)],
)  # fmt: skip
def test_a_change_must_bring_speed_or_spare_the_drive(
    tokens_per_s: float, written: float, named: bool
) -> None:
    found = rank(NOW, [change("x", Cost.NONE, tokens_per_s, written)])
    assert bool(found) is named


def test_where_nothing_fits_all_that_does_helps() -> None:
    slow = change("slow", Cost.NONE, 1.0)
    found = rank(NOT_NOW, [slow, change("never", Cost.NONE, 0.0)])
    assert found == [slow]
    assert slow.gain(NOT_NOW) == float("inf")
    assert slow.gain(NOW) == 0.01


def test_a_variant_that_updates_otherwise_is_measured_otherwise() -> None:
    """The small run of one way to update says nothing of another; coding of state is timed."""
    asked: list[FineTune] = []

    def site_for(job: FineTune) -> Site:
        asked.append(job)
        return replace(SITE, name="again")

    def found(**change: object) -> Site:
        return site_of_variant(SITE, JOB, replace(JOB, **change), site_for)  # type: ignore[arg-type]

    assert found(batch=4) is SITE
    assert found(recompute=True) is SITE
    assert not asked
    narrow = found(state_dtype="int8")
    assert narrow.coding_s_per_byte > found(state_dtype="bf16").coding_s_per_byte > 0
    assert not asked
    assert found(in_backward=True).name == "again"
    narrowed = replace(JOB, state_dtype="bf16")
    assert site_of_variant(SITE, narrowed, replace(JOB, state_dtype="int8"), site_for) is not SITE
    assert len(asked) == 2


def test_narrower_state_is_named_only_where_its_coding_is_worth_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forecaster, budget = Forecaster(llama()), Budget(3 * MIB // 2, None, GIB)
    now = forecaster.answer(JOB, SITE, budget)

    def named(site_for: object) -> set[str]:
        changes = advise(forecaster, JOB, SITE, budget, now, site_for)  # type: ignore[arg-type]
        return {change.what for change in changes if "optimizer state" in change.what}

    assert any("bf16" in what for what in named(None))
    for seconds, helps in ((0.0, True), (1e-6, False)):
        monkeypatch.setattr("offload.advise.coding_s_per_byte", lambda _, s=seconds: s)
        assert bool(named(lambda _: SITE)) is helps
