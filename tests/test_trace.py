"""Traces of several steps as one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.prefetch.trace import Access, Moment, Need, Phase, Trace, merged, retimed


def step(compute_s: float, other_bytes: int = 0, handling_s: float = 0.0) -> Trace:
    needs = (Need(0, Access.READ),)
    return Trace((Moment(Phase.FORWARD, needs, compute_s, other_bytes, handling_s),), (64,), {0: 0})


def test_a_slow_step_among_six_changes_no_time() -> None:
    seen = [step(s, handling_s=s / 4) for s in (1.0, 1.25, 1.25, 9.0, 0.25, 1.5)]
    (moment,) = retimed(step(77.0), *seen).moments
    assert moment.compute_s == 1.25
    assert moment.handling_s == 1.25 / 4


def test_what_hits_another_moment_in_each_step_is_in_the_sum() -> None:
    (one,) = step(1.0).moments
    hit = [
        tuple(replace(one, compute_s=5.0 if i == j else 1.0) for i in range(6)) for j in range(6)
    ]
    seen = [replace(step(1.0), moments=moments) for moments in hit]
    after = retimed(seen[0], *seen)
    assert sum(m.compute_s for m in after.moments) == pytest.approx(10.0)


def test_of_two_steps_times_are_means_and_memory_is_the_most() -> None:
    after = retimed(step(77.0, 10), step(1.0, 30), step(2.0, 20))
    assert after.moments[0].compute_s == 1.5
    assert after.moments[0].other_bytes == 30
    assert after.dead_after == {0: 0}


def test_a_first_step_and_a_second_give_the_lesser_time_and_the_greater_memory() -> None:
    (moment,) = merged(step(2.0, 10), step(1.0, 5)).moments
    assert (moment.compute_s, moment.other_bytes) == (1.0, 10)
