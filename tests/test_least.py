"""``bench/schedule.py``: no plan is foreseen to beat what it calls the least time of a step."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.prefetch.planner import plan, smallest_bytes
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.tiers.spec import Machine
from tests.test_planner import DUPLEX, ONE_DRIVE, SLOW, UNIT, traces

LEAST_S = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "schedule.py"))["least_s"]


def moment(compute_s: float, *needs: tuple[int, Access]) -> Moment:
    return Moment(Phase.FORWARD, tuple(Need(*n) for n in needs), compute_s, 0)


def test_the_least_time_of_a_step_by_hand() -> None:
    """60 bytes of each of two chunks, of which one fits: read anew in turn, 6 s beside 4 s of
    computing. (Memory is counted before a moment's own transfers: they are beside it here.)
    """
    machine = Machine(10.0, 5.0, 6.0, 4.0, 1e10, disk_latency_s=0.0)
    uses = [moment(4.0, (0, Access.READ)), moment(0.0), moment(4.0, (1, Access.READ)), moment(0.0)]
    trace = Trace(tuple(uses), (60, 60), {})
    assert LEAST_S(trace, machine, 120) == pytest.approx(8.0)
    assert LEAST_S(trace, machine, 60) == pytest.approx(12.0)
    assert LEAST_S(trace, machine, 90) == pytest.approx(8.0)  # half of each is 3 s
    # Beside 4 s of computing at a quarter of its pace the drive moves 10 of the 30 bytes.
    slow = replace(machine, beside_share=0.25)
    assert LEAST_S(trace, slow, 90) == pytest.approx(2 * (4.0 + 2.0))


def test_a_gradient_that_has_no_room_until_its_update_is_written_and_read() -> None:
    """One drive, one thing at a time: 12 s to write it, 6 s to read it and 6 s for the other."""
    machine = Machine(10.0, 5.0, 5.0, 2.5, 1e10, disk_latency_s=0.0)
    uses = [moment(0.0, (1, Access.FRESH)), moment(0.0, (0, Access.READ)),
            moment(0.0, (1, Access.READ)), moment(0.0)]  # fmt: skip
    trace = Trace(tuple(uses), (60, 60), {1: 2})
    assert LEAST_S(trace, machine, 60) == pytest.approx(24.0)
    assert LEAST_S(trace, machine, 120) == pytest.approx(0.0)
    alive = replace(trace, dead_after={})  # nothing changes: it dies when it is written anew
    assert LEAST_S(alive, machine, 60) > 24.0 - 1e-6


@settings(max_examples=120, deadline=None)
@given(traces(4, 6), st.integers(0, 5), st.sampled_from([ONE_DRIVE, DUPLEX, SLOW]),
       st.sampled_from([2, 48]), st.floats(0.1, 1.0))  # fmt: skip
def test_no_plan_is_foreseen_to_beat_the_least_time(
    trace: Trace, room: int, machine: Machine, count: int, share: float
) -> None:
    machine = replace(machine, disk_latency_s=0.0, beside_share=share)
    capacity_bytes = smallest_bytes(trace) + room * UNIT
    made = plan(trace, machine, capacity_bytes)
    assert (
        LEAST_S(trace, machine, capacity_bytes, count) <= made.forecast.step_s * (1 + 1e-6) + 1e-9
    )
