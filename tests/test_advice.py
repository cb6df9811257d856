"""Which changes are named, and in which order."""

from __future__ import annotations

import pytest

from offload.prefetch.advice import Change, Cost, Outcome, rank

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
