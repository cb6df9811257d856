"""Bounds of steps: against sums by hand, against an independent replay, and in what they follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.prefetch.bounds import IDLE, Drive, Framed, bound, drive_of, framed_bound
from offload.prefetch.planner import plan, smallest_bytes, stay
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.tiers.spec import Machine
from tests.test_planner import SLOW, traces

# Alone 10 B/s in and 5 B/s out; together 6 and 4.
DRIVE = Machine(10.0, 5.0, 6.0, 4.0, 1e10, disk_latency_s=0.0)
F, B, E, U = Phase.FORWARD, Phase.BACKWARD, Phase.EARLY, Phase.UPDATE


def timed(*moments: tuple[Phase, float, tuple[int, ...]], sizes: tuple[int, ...] = ()) -> Trace:
    """Moments of a phase that compute for so many seconds with these chunks."""
    found = (Moment(p, tuple(Need(c, Access.READ) for c in cs), s, 0) for p, s, cs in moments)
    return Trace(tuple(found), sizes, {})


# -- one processor --------------------------------------------------------------------------


def test_bound_adds_what_a_barrier_parts() -> None:
    """Passes: 10 s of disk over 4 of compute; update: 2 s of disk under 7 of compute."""
    trace = timed((F, 1.0, ()), (B, 3.0, ()), (U, 7.0, ()))
    much = drive_of(DRIVE, {F: 60, B: 40}, {U: 10})
    assert bound(much, trace) == pytest.approx((17.0, 11.0, "disk"))
    little = drive_of(DRIVE, {F: 60}, {U: 10})
    assert bound(little, trace) == pytest.approx((13.0, 11.0, "compute"))


def test_bytes_may_cross_the_barrier_as_far_as_memory_holds_them() -> None:
    trace, reads = timed((F, 8.0, ()), (U, 1.0, ())), {F: 20, U: 80}
    apart, some, enough = (
        bound(drive_of(DRIVE, reads, {}, spare_bytes), trace) for spare_bytes in (0, 20, 1000)
    )
    assert apart.bound_s == pytest.approx(16.0)  # passes 8, update 8
    assert some.bound_s == pytest.approx(14.0)  # a fifth of its reads come during the passes
    assert enough.bound_s == pytest.approx(enough.wire_bound_s) == pytest.approx(10.0)


def test_the_disk_is_slower_beside_cores_that_compute() -> None:
    """Of 4 s of computing the disk has 2 at half its pace: 10 s of it take 12, 2 s are hidden."""
    trace, slow = timed((F, 4.0, ()), (U, 7.0, ())), replace(DRIVE, beside_share=0.5)
    busy = drive_of(slow, {F: 100}, {})
    assert bound(busy, trace) == pytest.approx((12.0 + 7.0, 10.0 + 5.5, "disk"))
    hidden = drive_of(slow, {F: 20}, {})
    assert bound(hidden, trace) == pytest.approx((11.0, 11.0, "compute"))


def test_a_device_takes_no_cores_from_the_disk() -> None:
    """Only the update does, and an emulated device, which is the same cores."""
    busy = Drive(40.0, 10.0, 50.0, beside_share=0.5)
    device = framed((F, 10.0, ()), (B, 20.0, ()))
    apart = framed_bound(busy, host(4.0), device)
    assert apart == pytest.approx((40.0 + 12.0, 52.0, "disk"))
    same = framed_bound(busy, host(4.0), replace(device, one_processor=True))
    assert same == pytest.approx((55.0 + 12.0, 67.0, "disk"))


def test_without_a_tier_below_a_step_is_its_computing() -> None:
    trace = timed((F, 1.0, (0,)), (B, 3.0, (0,)), (U, 2.0, (0,)), sizes=(60,))
    trace = replace(trace, moments=(replace(trace.moments[0], handling_s=0.5), *trace.moments[1:]))
    made = stay(trace)
    assert made.forecast.limit == (6.0, 6.0, "compute")
    assert made.forecast.step_s == 6.5
    assert len(made.ops) == len(trace.moments)
    assert not any(ops.drops or ops.loads for ops in made.ops)


@settings(max_examples=150, deadline=None)
@given(traces(), st.integers(0, 6), st.floats(0.1, 1.0))
def test_no_plan_is_foreseen_to_beat_its_bound(trace: Trace, room: int, share: float) -> None:
    """But for what the moments at the barriers hold themselves, which may be written behind."""
    machine = replace(SLOW, disk_latency_s=0.0, beside_share=share)
    made = plan(trace, machine, smallest_bytes(trace) + room * 4096)
    held = max(sum(trace.chunk_bytes[n.chunk] for n in m.needs) for m in trace.moments)
    slack_s = machine.disk_s(0, 2 * held) / share
    assert made.forecast.bound_s <= (made.forecast.step_s + slack_s) * (1 + 1e-9)
    assert made.forecast.wire_bound_s <= made.forecast.bound_s * (1 + 1e-9)


@given(
    traces(), st.lists(st.integers(0, 10**6), min_size=4, max_size=4), st.integers(0, 10**5),
    st.integers(1, 10**6),
)  # fmt: skip
def test_a_bound_grows_with_bytes(
    trace: Trace, moved: list[int], spare_bytes: int, more: int
) -> None:
    reads, writes = {F: moved[0], U: moved[1]}, {B: moved[2], U: moved[3]}
    now = bound(drive_of(DRIVE, reads, writes, spare_bytes), trace)
    for phase in (F, U):
        then = bound(
            drive_of(DRIVE, reads | {phase: reads[phase] + more}, writes, spare_bytes), trace
        )
        assert then.bound_s >= now.bound_s * (1 - 1e-9)
        assert then.wire_bound_s >= now.wire_bound_s * (1 - 1e-9)


# -- a device -------------------------------------------------------------------------------


def host(update_s: float = 0.0, early_s: float = 0.0) -> Trace:
    return timed((F, 99.0, ()), (E, early_s, ()), (U, update_s, ()))


def framed(*moments: tuple[Phase, float, tuple[int, ...]], **how: float | bool) -> Framed:
    """Chunks of 100 bytes, 90 of which cross the bus, at 10 B/s."""
    return Framed(timed(*moments, sizes=(100, 100)), (90, 90), 10.0, **how)  # type: ignore[arg-type]


def test_each_pass_waits_for_its_copies_or_its_computing() -> None:
    """Forward 18 s of copies over 5, backward 30 s of computing over 18; the update 4 s."""
    device = framed((F, 2.0, (0,)), (F, 3.0, (1,)), (B, 20.0, (1,)), (B, 10.0, (0,)))
    found = framed_bound(IDLE, host(4.0), device)
    assert found == pytest.approx((18.0 + 30.0 + 4.0, 36.0, "compute"))
    link = framed_bound(IDLE, host(4.0), replace(device, down_s=60.0))
    assert link == pytest.approx((18.0 + 60.0 + 4.0, 60.0, "link"))
    update = framed_bound(IDLE, host(50.0), device)
    assert update == pytest.approx((18.0 + 30.0 + 50.0, 50.0, "update"))
    disk = framed_bound(Drive(80.0, 1.0, 81.0), host(4.0), device)
    assert disk == pytest.approx((80.0 + 4.0, 81.0, "disk"))


def test_every_pass_of_an_accumulation_fetches_anew() -> None:
    once = framed((F, 0.0, (0, 1)), (B, 0.0, (0, 1)))
    twice = replace(once, trace=replace(once.trace, moments=2 * once.trace.moments))
    assert framed_bound(IDLE, host(), once).bound_s == pytest.approx(36.0)
    assert framed_bound(IDLE, host(), twice).bound_s == pytest.approx(72.0)
    kept = framed_bound(IDLE, host(), replace(twice, kept=True))
    assert kept.bound_s == pytest.approx(18.0)  # copies outlive passes
    assert framed_bound(IDLE, host(), replace(once, read_bytes=600)).bound_s == pytest.approx(54.0)


def test_an_update_in_the_backward_pass_is_beside_it_on_processors_of_its_own() -> None:
    device = framed((F, 18.0, (0, 1)), (B, 20.0, (0, 1)))
    assert framed_bound(IDLE, host(1.0, 5.0), device) == pytest.approx((39.0, 38.0, "compute"))
    assert framed_bound(IDLE, host(1.0, 70.0), device) == pytest.approx((89.0, 71.0, "update"))
    same = framed_bound(IDLE, host(1.0, 70.0), replace(device, one_processor=True))
    assert same == pytest.approx((39.0, 39.0, "compute"))  # the device's computing has it


def replayed_s(device: Framed, downs_s: list[float], update_s: float) -> float:
    """A step that copies as early as frames that do not outlive a pass allow: nothing is short."""
    now_s, sent = 0.0, iter(downs_s)
    before = None
    up_s = down_s = 0.0
    there: set[int] = set()
    for moment in device.trace.moments:
        way = moment.phase.in_backward
        if way is not before:  # the pass ends when its last gradient is on the host
            now_s = up_s = down_s = max(now_s, down_s)
            there, before = set(), way
        for need in moment.needs:
            if need.chunk not in there:
                there.add(need.chunk)
                up_s += device.up_bytes[need.chunk] / device.up_bytes_per_s
                now_s = max(now_s, up_s)
        now_s += moment.compute_s
        if way:
            down_s = max(down_s, now_s) + next(sent)
    return max(now_s, down_s) + update_s


@st.composite
def framed_steps(draw: st.DrawFn) -> tuple[Framed, list[float], float]:
    """A device's part, the seconds of each gradient's copy, and those of the update."""
    seconds = st.floats(0, 10)
    moments = draw(st.lists(
        st.tuples(st.sampled_from([F, B]), seconds, st.sets(st.integers(0, 4), max_size=3)),
        min_size=1, max_size=12,
    ))  # fmt: skip
    sizes = tuple(draw(st.lists(st.integers(1, 100), min_size=5, max_size=5)))
    trace = timed(*((p, s, tuple(sorted(cs))) for p, s, cs in moments), sizes=sizes)
    downs_s = [draw(seconds) for p, _, _ in moments if p is B]
    device = Framed(trace, sizes, draw(st.floats(1, 50)), down_s=sum(downs_s))
    return device, downs_s, draw(seconds)


@settings(max_examples=150, deadline=None)
@given(framed_steps())
def test_no_replay_of_a_framed_step_beats_its_bound(
    step: tuple[Framed, list[float], float],
) -> None:
    device, downs_s, update_s = step
    found = framed_bound(IDLE, host(update_s), device)
    assert found.bound_s <= replayed_s(device, downs_s, update_s) + 1e-9
    assert found.wire_bound_s <= found.bound_s + 1e-9


@given(framed_steps(), st.floats(1, 4))
def test_a_framed_bound_grows_with_work(
    step: tuple[Framed, list[float], float], times: float
) -> None:
    device, _, update_s = step
    now = framed_bound(IDLE, host(update_s), device)
    wider = tuple(int(b * times) for b in device.up_bytes)
    for more in (
        framed_bound(IDLE, host(update_s * times), device),
        framed_bound(IDLE, host(update_s), replace(device, up_bytes=wider)),
        framed_bound(IDLE, host(update_s), replace(device, down_s=device.down_s * times)),
        framed_bound(Drive(5.0 * times, times, 6.0 * times), host(update_s), device),
    ):
        assert more.bound_s >= now.bound_s - 1e-9
        assert more.wire_bound_s >= now.wire_bound_s - 1e-9
