"""Which chunks live on the device, by a recorded step: what fits, what pays, how spread out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.prefetch.resident import Offer, choose_residents
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace


def trace_of(sizes: list[int], other: list[int]) -> Trace:
    """Each chunk once forward and once backward, alone."""
    order = [*range(len(sizes)), *reversed(range(len(sizes)))]
    moments = tuple(
        Moment(
            Phase.FORWARD if i < len(sizes) else Phase.BACKWARD,
            (Need(c, Access.READ),), 0.01, other[c],
        )
        for i, c in enumerate(order)
    )  # fmt: skip
    return Trace(moments, tuple(sizes), {})


@st.composite
def cases(draw: st.DrawFn) -> tuple[Trace, list[Offer], int, int]:
    count = draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, 100), min_size=count, max_size=count))
    other = draw(st.lists(st.integers(0, 300), min_size=count, max_size=count))
    offered = draw(st.sets(st.integers(0, count - 1)))
    offers = [
        Offer(c, sizes[c] * draw(st.integers(1, 4)), draw(st.floats(0, 1))) for c in sorted(offered)
    ]
    return trace_of(sizes, other), offers, draw(st.integers(0, 2000)), draw(st.integers(0, 200))


@given(cases())
def test_they_fit_beside_every_moment_and_two_chunks_ahead(
    case: tuple[Trace, list[Offer], int, int],
) -> None:
    trace, offers, capacity, aside = case
    chosen = set(choose_residents(trace, offers, capacity, aside_bytes=aside))
    assert chosen <= {offer.chunk for offer in offers}
    if not chosen:
        return
    cost = sum(offer.cost_bytes for offer in offers if offer.chunk in chosen)
    streamed = [size for c, size in enumerate(trace.chunk_bytes) if c not in chosen]
    for moment in trace.moments:
        held = sum(trace.chunk_bytes[n.chunk] for n in moment.needs if n.chunk not in chosen)
        ahead = sum(sorted(streamed)[-2:])
        assert cost + max(moment.other_bytes + held, aside) + ahead <= capacity


@given(cases())
def test_with_room_for_all_all_come(case: tuple[Trace, list[Offer], int, int]) -> None:
    trace, offers, _, aside = case
    enough = sum(o.cost_bytes for o in offers) + sum(trace.chunk_bytes) + 300 + aside
    assert set(choose_residents(trace, offers, enough + 200, aside_bytes=aside)) == {
        o.chunk for o in offers
    }


def test_everything_needs_no_room_for_frames() -> None:
    trace = trace_of([10] * 6, [7] * 6)
    offers = [Offer(c, 40, 1.0) for c in range(6)]
    assert len(choose_residents(trace, offers, 247)) == 6
    assert len(choose_residents(trace, offers, 246)) == 5
    assert len(choose_residents(trace, offers[:5], 247)) == 5
    assert len(choose_residents(trace, offers, 247, aside_bytes=8)) < 6


def test_what_spares_more_for_a_byte_comes_first() -> None:
    trace = trace_of([10] * 4, [0] * 4)
    offers = [Offer(0, 40, 4.0), Offer(1, 10, 3.0), Offer(2, 40, 1.0), Offer(3, 10, 0.1)]
    assert choose_residents(trace, offers, 30 + 50) == (1, 0)


def test_of_equals_some_of_every_stretch_come() -> None:
    trace = trace_of([10] * 32, [0] * 32)
    offers = [Offer(c, 10, 1.0) for c in range(32)]
    chosen = choose_residents(trace, offers, 30 + 160)
    assert len(chosen) == 16
    for start in range(0, 32, 8):
        assert 3 <= sum(start <= c < start + 8 for c in chosen) <= 5


def test_what_no_moment_needs_stays_away() -> None:
    trace = trace_of([10, 10], [0, 0])
    wider = Trace(trace.moments, (10, 10, 10), {})
    offers = [Offer(c, 10, 1.0) for c in range(3)]
    assert 2 not in choose_residents(wider, offers, 1000)
    assert choose_residents(Trace((), (10,), {}), offers[:1], 1000) == ()
