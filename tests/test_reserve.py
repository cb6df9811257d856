"""What the planner leaves free to read ahead in, and how reads lie; what a forecast counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.prefetch.bounds import bound, drive_of
from offload.prefetch.planner import plan, smallest_bytes
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.tiers.spec import MIB, Machine
from tests.test_planner import DUPLEX, ONE_DRIVE, SLOW, UNIT, check, typical


def test_a_moment_that_was_held_up_buys_no_bytes() -> None:
    """What one recorded time promises (all reads hidden in it) is not worth many bytes."""
    smooth = typical(layers=12, pieces=2, size_bytes=4 * MIB, compute_s=0.002)
    capacity_bytes = smallest_bytes(smooth) * 12
    least = plan(smooth, DUPLEX, capacity_bytes).forecast
    for held_up in (3, 20, 30, 45):
        moments = list(smooth.moments)
        moments[held_up] = replace(moments[held_up], compute_s=0.2)
        noisy = plan(replace(smooth, moments=tuple(moments)), DUPLEX, capacity_bytes).forecast
        moved_bytes = noisy.read_bytes + noisy.write_bytes
        assert moved_bytes <= 1.05 * (least.read_bytes + least.write_bytes)


@pytest.mark.parametrize("halves", range(20, 36))
def test_a_reserve_is_of_whole_chunks(halves: int) -> None:
    """In half of one no read can begin, so reads would come in pairs, just before they are due."""
    size, count = 2 * MIB, 20
    pairs = [(c,) if c % 3 else (c, (c + 1) % count) for c in range(count)]
    moments = [
        Moment(Phase.FORWARD, tuple(Need(c, Access.READ) for c in pair), 0.0011, 0)
        for pair in pairs
    ]
    trace = Trace(tuple(moments), (size,) * count, {})
    assert plan(trace, ONE_DRIVE, halves * size // 2).reserve_bytes % size == 0


@pytest.mark.parametrize(("phase", "waits"), [(Phase.FORWARD, False), (Phase.BACKWARD, True)])
def test_a_forward_pass_reads_ahead_into_what_it_has_left(phase: Phase, waits: bool) -> None:
    """Each moment takes as long as a read; what stays for a moment more holds the next one up."""
    size, count = 2 * MIB, 40
    read_s = size / ONE_DRIVE.read_bytes_per_s + ONE_DRIVE.disk_latency_s
    needs = [(Need(c, Access.READ),) for c in range(count)]
    trace = Trace(tuple(Moment(phase, n, 1.01 * read_s, 0) for n in needs), (size,) * count, {})
    made = plan(trace, ONE_DRIVE, 2 * size)
    assert (made.forecast.stall_s > 0.1 * made.forecast.step_s) is waits


def test_what_is_read_lies_apart() -> None:
    """Half of the chunks stay. If those were the first the drive would idle, then be too slow."""
    count = 40
    needs = [(Need(c, Access.READ),) for c in range(count)]
    moments = tuple(Moment(Phase.FORWARD, n, 0.7 * UNIT / 10.0, 0) for n in needs)
    trace = Trace(moments, (UNIT,) * count, {})
    made = plan(trace, SLOW, count // 2 * UNIT)
    check(trace, made, count // 2 * UNIT)
    assert made.forecast.read_bytes <= (count // 2 + 2) * UNIT
    assert made.forecast.stall_s < 0.01 * made.forecast.step_s


def test_reads_lie_apart_where_that_spares_some() -> None:
    """Six layers that need much at once, a little between: what stays is of all layers."""
    chunks, moments = 0, []
    for _ in range(6):
        few = (Need(chunks, Access.READ),)
        many = tuple(Need(c, Access.READ) for c in range(chunks + 1, chunks + 50))
        moments += [Moment(Phase.FORWARD, few, 0.1, 0), Moment(Phase.FORWARD, many, 0.1, 0)]
        chunks += 50
    size = 16384
    trace = Trace(tuple(moments), (size,) * chunks, {})
    made = plan(trace, Machine(2e9, 2e9, 1e9, 1e9, 8e9), 250 * size)
    kept = chunks - made.forecast.read_bytes // size
    # All but a layer's own stay while it is computed with: 201 and a sixth of all that stays.
    assert kept >= 235


def test_a_forecast_says_what_it_moves_for_each_phase() -> None:
    trace = _tight()
    made = plan(trace, SLOW, smallest_bytes(trace))
    forecast = made.forecast
    assert sum(forecast.phase_read_bytes.values()) == forecast.read_bytes > 0
    assert sum(forecast.phase_write_bytes.values()) == forecast.write_bytes
    moved = forecast.phase_read_bytes, forecast.phase_write_bytes
    limit = bound(drive_of(SLOW, *moved, made.reserve_bytes), trace)
    assert limit == forecast.limit


def test_the_fullest_moment_does_not_forbid_to_read_ahead_elsewhere() -> None:
    """One moment fills all memory; in the others there is room to read the next chunk ahead."""
    trace = _tight()
    made = plan(trace, SLOW, smallest_bytes(trace))
    assert made.reserve_bytes > 0
    serial_s = sum(m.compute_s for m in trace.moments) + SLOW.disk_s(made.forecast.read_bytes, 0)
    assert made.forecast.step_s < 0.8 * serial_s


def _tight() -> Trace:
    """Chunks in turn, computing as long as one read; a last moment that takes all the memory."""
    read_s = SLOW.disk_s(UNIT, 0)
    uses = [Moment(Phase.FORWARD, (Need(c, Access.READ),), read_s, 0) for c in range(40)]
    full = Moment(Phase.FORWARD, (Need(0, Access.READ),), 0.0, UNIT)
    return Trace((*uses, full), (UNIT,) * 40, {})
