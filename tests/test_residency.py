"""What stays between uses: against a brute force; packing by columns against one by one."""

from __future__ import annotations

import random
from collections import deque
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.prefetch import residency
from offload.prefetch.planner import plan
from offload.prefetch.residency import Gaps, Room, choose, find_gaps, spread, taken
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.prefetch.uses import Bools, Floats, Ints, find_uses
from tests.test_planner import DUPLEX, ONE_DRIVE, UNIT, check, traces, typical


def best_saving(gaps: Gaps, room: Ints) -> float:
    """The most that any choice of gaps saves, by trying all of them."""
    best = 0.0
    for choice in product([False, True], repeat=len(gaps.chunk)):
        kept = np.array(choice) | (gaps.span == 0)
        load = np.zeros(len(room), dtype=np.int64)
        for g in np.flatnonzero(kept):
            for step in range(gaps.span[g]):
                load[(gaps.after[g] + 1 + step) % len(room)] += gaps.size_bytes[g]
        if (load <= room).all():
            best = max(best, gaps.saved_s(kept))
    return best


def load_of(gaps: Gaps, kept: Bools, room: Ints) -> Floats:
    return taken((gaps.after + 1)[kept], gaps.span[kept], gaps.size_bytes[kept], len(room))


def fills_its_room(gaps: Gaps, kept: Bools, room: Ints) -> None:
    """The choice fits, and nothing else that saves a read would fit besides."""
    load = load_of(gaps, kept, room)
    assert (load <= room).all()
    for g in np.flatnonzero(~kept & (gaps.read_s > 0)):
        span = gaps.after[g] + 1 + np.arange(gaps.span[g])
        assert ((room - load)[span % len(room)] < gaps.size_bytes[g]).any()


@pytest.mark.parametrize("chunks", range(0, 40, 3))
def test_no_room_is_left_unused(chunks: int) -> None:
    """Also after an epoch that was wanted whole did not fit: its first gaps are given back."""
    trace = typical(6, 2, UNIT, 0.0)
    gaps = find_gaps(trace, DUPLEX, find_uses(trace))
    passes = np.arange(len(trace.moments)) < 12
    room = UNIT * (chunks + np.where(passes, 3, 0))
    fills_its_room(gaps, choose(gaps, room), room)
    packing = residency._Packing(gaps, room)
    packing.by_price(np.zeros(len(gaps.chunk)))
    load = load_of(gaps, packing.kept, room)
    assert packing.room.free.tolist() == (room - load).tolist()


def test_residency_is_near_the_brute_force_optimum() -> None:
    """Mostly the optimum itself on tiny instances of unequal sizes, and never far from it."""
    rng = random.Random(0)
    ratios: list[float] = []
    while len(ratios) < 150:
        sizes = tuple(UNIT * rng.randint(1, 5) for _ in range(rng.randint(2, 4)))
        moments = []
        for _ in range(rng.randint(3, 6)):
            chunks = rng.sample(range(len(sizes)), rng.randint(0, min(3, len(sizes))))
            needs = tuple(Need(c, rng.choice(list(Access))) for c in chunks)
            moments.append(Moment(Phase.FORWARD, needs, 0.0, 0))
        trace = Trace(tuple(moments), sizes, {})
        gaps = find_gaps(trace, ONE_DRIVE, find_uses(trace))
        room = np.full(len(moments), UNIT * rng.randint(1, 8), dtype=np.int64)
        best = best_saving(gaps, room) if 0 < len(gaps.chunk) <= 8 else 0.0
        if best == 0:
            continue
        kept = choose(gaps, room)
        fills_its_room(gaps, kept, room)
        ratios.append(gaps.saved_s(kept) / best)
    assert max(ratios) <= 1 + 1e-9
    assert min(ratios) >= 0.6
    assert sum(r > 1 - 1e-9 for r in ratios) >= 0.9 * len(ratios)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_room_table_agrees_with_a_plain_array(data: st.DataObject) -> None:
    """Over many blocks, with spans around the end."""
    moments = data.draw(st.integers(1, 1500))
    plain = deque([100] * moments)
    room = Room(np.full(moments, 100, dtype=np.int64))
    for _ in range(8):
        first = data.draw(st.integers(0, moments - 1))
        length = data.draw(st.integers(0, moments))
        size = data.draw(st.integers(1, 60))
        span = [(first + i) % moments for i in range(length)]
        fits = all(plain[t] >= size for t in span)
        assert room.fits(first, length, size) == fits
        if fits:
            room.take(first, length, size)
            for t in span:
                plain[t] -= size
    assert room.free.tolist() == list(plain)
    spans = [
        (data.draw(st.integers(0, moments - 1)), data.draw(st.integers(1, moments)),
         data.draw(st.integers(1, 100)))
        for _ in range(8)
    ]  # fmt: skip
    first_, length_, size_ = (np.array(column) for column in zip(*spans, strict=True))
    assert room.fit(first_, length_, size_).tolist() == [room.fits(*span) for span in spans]


@settings(max_examples=60, deadline=None)
@given(traces(most_chunks=12, most_moments=30), st.integers(0, 40))
def test_packing_by_columns_keeps_what_packing_one_by_one_keeps(trace: Trace, free: int) -> None:
    gaps = find_gaps(trace, ONE_DRIVE, find_uses(trace))
    room = np.full(len(trace.moments), free * UNIT, dtype=np.int64)
    if not len(gaps.chunk):
        return
    outcomes = []
    for run in (1, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(residency, "_RUN", run)
            packing = residency._Packing(gaps, room)
            packing.by_price(np.arange(len(gaps.chunk)) % 3 * gaps.read_s / 2)
            packing.fill()
        fills_its_room(gaps, packing.kept, room)
        outcomes.append(packing.kept.tolist())
    assert outcomes[0] == outcomes[1]


@settings(max_examples=60, deadline=None)
@given(traces(most_chunks=12, most_moments=30), st.integers(0, 40))
def test_reads_that_lie_apart_are_no_more(trace: Trace, free: int) -> None:
    gaps = find_gaps(trace, ONE_DRIVE, find_uses(trace))
    room = np.full(len(trace.moments), free * UNIT, dtype=np.int64)
    if not len(gaps.chunk):
        return
    kept = choose(gaps, room)
    apart = spread(gaps, room, kept)
    fills_its_room(gaps, apart, room)
    assert gaps.saved_s(apart) >= gaps.saved_s(kept)


def test_a_large_trace_is_planned_from_a_sample_of_its_prices() -> None:
    """The sample finds what all gaps find: the bytes moved are the same within a percent."""
    trace = typical(24, 8, UNIT, 1e-3)
    moved = []
    for sample in (10**6, 400):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(residency, "_SAMPLE", sample)
            made = plan(trace, ONE_DRIVE, 300 * UNIT)
        check(trace, made, 300 * UNIT)
        moved.append(made.forecast.read_bytes + made.forecast.write_bytes)
    assert moved[1] <= 1.01 * moved[0]
