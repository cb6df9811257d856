"""The replay against steps worked out by hand, and rules that every timeline must keep."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.prefetch.bounds import IDLE, bound
from offload.prefetch.plan import Ops
from offload.prefetch.planner import plan, smallest_bytes
from offload.prefetch.sharing import ALONE, Sharing
from offload.prefetch.simulate import Deadlock, Lane, Timeline, simulate
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.tiers.spec import Machine
from tests.test_planner import traces

# Alone 10 B/s in and 5 B/s out; together 6 and 4.
DRIVE = Machine(10.0, 5.0, 6.0, 4.0, 1e10, disk_latency_s=0.0)
LATE = Machine(10.0, 5.0, 6.0, 4.0, 1e10, disk_latency_s=0.5)


def step(*needs: tuple[int, Access], compute_s: float = 0.0, other_bytes: int = 0) -> Moment:
    return Moment(Phase.FORWARD, tuple(Need(*n) for n in needs), compute_s, other_bytes)


R, W, F = Access.READ, Access.WRITE, Access.FRESH


def two_in_turn(access: Access) -> Trace:
    """Two chunks of 60 bytes, each used for 4 s."""
    return Trace((step((0, access), compute_s=4.0), step((1, access), compute_s=4.0)), (60, 60), {})


IN_TURN = (Ops(drops=(1,), loads=(0,)), Ops(drops=(0,), loads=(1,)))


def test_reads_without_room_to_read_ahead_add_to_compute() -> None:
    line = simulate(two_in_turn(R), DRIVE, 60, IN_TURN, frozenset({1}))
    assert line.step_s == pytest.approx(2 * (6.0 + 4.0))
    assert line.stalls_s == pytest.approx([6.0, 6.0])
    assert (line.read_bytes, line.write_bytes, line.peak_bytes) == (120, 0, 60)


def test_the_engines_own_work_is_foreseen_but_is_no_bound() -> None:
    quick = two_in_turn(R)
    slow = replace(quick, moments=tuple(replace(m, handling_s=1.0) for m in quick.moments))
    line = simulate(slow, DRIVE, 60, IN_TURN, frozenset({1}))
    assert line.step_s == pytest.approx(2 * (6.0 + 1.0 + 4.0))
    assert bound(IDLE, slow) == bound(IDLE, quick)


def test_latency_is_paid_per_transfer() -> None:
    line = simulate(two_in_turn(R), LATE, 60, IN_TURN, frozenset({1}))
    assert line.step_s == pytest.approx(2 * (6.0 + 0.5 + 4.0))


def test_a_read_starts_only_when_the_dirty_chunk_before_it_is_written() -> None:
    line = simulate(two_in_turn(W), DRIVE, 60, IN_TURN, frozenset({1}))
    assert line.step_s == pytest.approx(2 * (12.0 + 6.0 + 4.0))
    assert (line.read_bytes, line.write_bytes, line.peak_bytes) == (120, 120, 60)


def test_directions_slow_each_other_while_both_run() -> None:
    """60 in at 6 B/s takes 10 s, in which 40 of 60 go out; the other 20 take 4 s alone."""
    line = simulate(two_in_turn(W), DRIVE, 120, IN_TURN, frozenset({1}))
    assert line.stalls_s == pytest.approx([10.0, 10.0])
    assert line.step_s == pytest.approx(2 * (10.0 + 4.0))
    reads = [i[1:] for i in line.intervals if i.lane is Lane.READ]
    writes = [i[1:] for i in line.intervals if i.lane is Lane.WRITE]
    assert sum(reads, ()) == pytest.approx((0, 0, 10, 1, 14, 24))
    assert sum(writes, ()) == pytest.approx((1, 0, 14, 0, 14, 28))


def test_reading_ahead_hides_behind_compute() -> None:
    """Both loads are queued a moment early: of 6 s to read, 4 are hidden by compute."""
    ops = (Ops(drops=(1,), loads=(1,)), Ops(drops=(0,), loads=(0,)))
    line = simulate(two_in_turn(R), DRIVE, 120, ops, frozenset({0, 1}))
    assert line.stalls_s == pytest.approx([2.0, 2.0])
    assert line.peak_bytes == 120


def test_lanes_that_share_cores_slow_each_other_while_both_run() -> None:
    """At half their paces 40 of 60 bytes come in 8 s of computing; the rest at the full pace."""
    ops = (Ops(drops=(1,), loads=(1,)), Ops(drops=(0,), loads=(0,)))
    halves = Sharing(0.5, 0.5)
    line = simulate(two_in_turn(R), DRIVE, 120, ops, frozenset({0, 1}), halves)
    assert line.stalls_s == pytest.approx([2.0, 2.0])
    assert line.step_s == pytest.approx(2 * (8.0 + 2.0))
    moments = tuple(replace(m, compute_s=8.0) for m in two_in_turn(R).moments)
    line = simulate(Trace(moments, (60, 60), {}), DRIVE, 120, ops, frozenset({0, 1}), halves)
    assert line.stall_s == 0
    assert line.step_s == pytest.approx(2 * (12.0 + 2.0))  # six lone seconds take twelve


def test_recorded_computing_slows_the_drive_as_was_measured_and_not_itself() -> None:
    """At half its pace 20 of 60 bytes come in 4 s of computing; the rest at the full pace."""
    ops = (Ops(drops=(1,), loads=(1,)), Ops(drops=(0,), loads=(0,)))
    slow = replace(DRIVE, beside_share=0.5)
    line = simulate(two_in_turn(R), slow, 120, ops, frozenset({0, 1}))
    assert line.step_s == pytest.approx(2 * (4.0 + 4.0))
    assert line.stalls_s == pytest.approx([4.0, 4.0])


@given(st.floats(0, 0.9), st.floats(0, 0.9))
def test_paces_are_those_that_the_costs_tell(drag: float, disk_drag: float) -> None:
    """In T = C + drag R = R + disk_drag C together, each side did its lone seconds."""
    paces = Sharing.of(drag, disk_drag)
    assert paces.compute + drag * paces.drive == pytest.approx(1)
    assert paces.drive + disk_drag * paces.compute == pytest.approx(1)
    assert Sharing.of(0.0, 0.0) == ALONE


def test_a_chunk_is_read_back_only_after_its_own_write() -> None:
    trace = Trace((step((0, W)), step()), (60,), {})
    line = simulate(trace, DRIVE, 120, (Ops(loads=(0,)), Ops(drops=(0,))), frozenset())
    assert line.step_s == pytest.approx(12.0 + 6.0)


def test_a_chunk_is_overwritten_only_after_its_own_write() -> None:
    trace = Trace((step((0, F)), step()), (60,), {})
    line = simulate(trace, DRIVE, 120, (Ops(), Ops(drops=(0,))), frozenset())
    assert line.stalls_s == pytest.approx([12.0, 0.0])


def test_fresh_contents_take_room_and_no_read_and_dead_ones_no_write() -> None:
    moments = (step((0, F)), step((1, F)), step())
    ops = (Ops(), Ops(drops=(0,)), Ops(drops=(1,)))
    line = simulate(Trace(moments, (60, 60), {1: 1}), DRIVE, 60, ops, frozenset())
    assert (line.read_bytes, line.write_bytes) == (0, 60)
    assert line.stalls_s == pytest.approx([0.0, 12.0, 0.0])


def test_no_read_takes_the_room_that_fresh_contents_wait_for() -> None:
    """Beside the write the read would have room, but would slow the write that all wait for."""
    moments = (step((0, F)), step((1, F)), step((2, R)))
    ops = (Ops(drops=(2,)), Ops(drops=(0,), loads=(2,)), Ops(drops=(1,)))
    line = simulate(Trace(moments, (60, 60, 20), {1: 1}), DRIVE, 100, ops, frozenset({2}))
    assert line.stalls_s == pytest.approx([0.0, 12.0, 2.0])


def test_other_memory_waits_until_writes_have_made_room() -> None:
    moments = (step((0, F)), step(other_bytes=60))
    line = simulate(Trace(moments, (60,), {}), DRIVE, 60, (Ops(), Ops(drops=(0,))), frozenset())
    assert line.stalls_s == pytest.approx([0.0, 12.0])
    assert line.peak_bytes == 60


@pytest.mark.parametrize(
    ("capacity", "ops", "what"),
    [
        (120, (Ops(loads=(0,)), Ops(drops=(0,))), "waits for ever for chunks \\[1\\]"),
        (60, (Ops(loads=(0, 1)), Ops()), "waits for ever for chunks \\[1\\]"),
        (120, (Ops(drops=(1,), loads=(0,)), Ops()), "drops chunk 1, which is not"),
    ],
    ids=["never loaded", "no room", "drop of nothing"],
)
def test_operations_that_cannot_work_are_found(
    capacity: int, ops: tuple[Ops, ...], what: str
) -> None:
    with pytest.raises(Deadlock, match=what):
        simulate(two_in_turn(R), DRIVE, capacity, ops, frozenset())


def lanes_keep_their_limits(trace: Trace, machine: Machine, line: Timeline) -> bool:
    """One transfer at a time a lane, each as long as the rates allow."""
    ends = {
        Lane.READ: (machine.read_bytes_per_s, machine.mixed_read_bytes_per_s),
        Lane.WRITE: (machine.write_bytes_per_s, machine.mixed_write_bytes_per_s),
    }
    for lane, (fast, slow) in ends.items():
        mine = [i for i in line.intervals if i.lane is lane]
        if any(b.start_s < a.end_s - 1e-6 for a, b in pairwise(mine)):
            return False
        for i in mine:
            size, took_s = trace.chunk_bytes[i.item], i.end_s - i.start_s
            least_s = size / fast + machine.disk_latency_s
            if not least_s * (1 - 1e-6) <= took_s <= least_s * (1 + 1e-6) * fast / slow:
                return False
    return True


@settings(max_examples=100, deadline=None)
@given(traces())
def test_every_timeline_keeps_the_rules(trace: Trace) -> None:
    machine = Machine(1e4, 5e3, 6e3, 4e3, 1e10, disk_latency_s=0.01)
    capacity = smallest_bytes(trace) + 3 * 4096
    made = plan(trace, machine, capacity)
    line = simulate(trace, machine, capacity, made.ops, made.resident_at_start)
    assert lanes_keep_their_limits(trace, machine, line)
    compute_s = sum(m.compute_s for m in trace.moments)
    assert line.step_s == pytest.approx(compute_s + line.stall_s)
    assert min(line.stalls_s) >= 0
    assert line.peak_bytes <= capacity
    moved = sum(trace.chunk_bytes[i.item] for i in line.intervals if i.lane is not Lane.COMPUTE)
    assert moved == line.read_bytes + line.write_bytes
    # What one lap leaves to write the next one does: the drive has all of it in a step's time.
    slack_s = capacity / machine.mixed_write_bytes_per_s
    assert line.step_s + slack_s >= made.forecast.wire_bound_s
