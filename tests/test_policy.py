"""The choice of keep, recompute or swap: never over the budget, never worse than one answer."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.below import DiskBelow
from offload.prefetch.policy import Choice, Link, Part, Room, Unit, Way, decide, predict
from offload.tiers.lane import Meter
from offload.tiers.spec import Machine

MIB = 1 << 20
LINK = Link(2e9, 2e9, 1.0, 1e10)
KEEP, DROP, SWAP = Choice(Way.KEEP), Choice(Way.RECOMPUTE), Choice(Way.SWAP, 1.0)

links_of_two_st = st.builds(
    Link, st.floats(1e8, 1e10), st.floats(1e8, 1e10), st.floats(0, 1),
    room_bytes=st.integers(0, 200 * MIB),
    beyond=st.none() | st.builds(Link, st.floats(1e8, 1e10), st.floats(1e8, 1e10)),
)  # fmt: skip

units_st = st.lists(
    st.builds(
        Unit,
        forward_s=st.floats(0.001, 0.2),
        saved_bytes=st.integers(0, 64 * MIB),
        boundary_bytes=st.integers(0, 4 * MIB),
        recomputable=st.booleans(),
    ),
    min_size=1,
    max_size=9,
)
rooms_st = st.builds(
    Room,
    available_bytes=st.integers(0, 700 * MIB),
    head_bytes=st.integers(0, 32 * MIB),
    free_bytes=st.integers(0, 700 * MIB),
    displace_s_per_byte=st.sampled_from([0.0, 1e-9, 1e-7]),
)
links_st = st.none() | st.builds(
    Link, st.floats(1e8, 1e10), st.floats(1e8, 1e10), st.floats(0, 1), st.sampled_from([1e9, 1e10])
)


def peak(units: list[Unit], choices: tuple[Choice, ...], room: Room) -> int:
    """Most bytes held at once, written anew: forward pass, head, then backward from the last."""
    kept = [
        0 if c.way is Way.RECOMPUTE
        else u.saved_bytes - int(c.swapped * u.saved_bytes) if c.way is Way.SWAP
        else u.saved_bytes
        for u, c in zip(units, choices, strict=True)
    ]  # fmt: skip
    swaps = any(c.way is Way.SWAP and int(c.swapped * u.saved_bytes) for u, c in
                zip(units, choices, strict=True))  # fmt: skip
    ahead = max(u.saved_bytes for u in units) if swaps else 0
    held = sum(u.boundary_bytes for u in units)
    worst = held + sum(kept) + room.head_bytes + ahead
    for i in reversed(range(len(units))):
        worst = max(worst, held + sum(kept[:i]) + units[i].saved_bytes + ahead)
        held -= units[i].boundary_bytes
    return worst


@settings(max_examples=300, deadline=None)
@given(units_st, rooms_st, links_st)
def test_never_over_the_budget(units: list[Unit], room: Room, link: Link | None) -> None:
    decision = decide(units, room, link)
    assert len(decision.choices) == len(units)
    within = peak(units, decision.choices, room) <= room.available_bytes
    assert within == decision.fits
    for unit, choice in zip(units, decision.choices, strict=True):
        assert unit.recomputable or choice.way is not Way.RECOMPUTE
        assert link is not None or choice.way is not Way.SWAP


@settings(max_examples=300, deadline=None)
@given(units_st, rooms_st, links_st)
def test_never_worse_than_one_answer_for_all(
    units: list[Unit], room: Room, link: Link | None
) -> None:
    decision = decide(units, room, link)
    for choice in (KEEP, DROP, SWAP):
        if choice is SWAP and link is None:
            continue
        if choice is DROP and not all(u.recomputable for u in units):
            continue
        other = predict(units, [choice] * len(units), room, link)
        if other.fits:
            assert decision.fits
            assert decision.added_s <= other.added_s + 1e-12


@settings(max_examples=100, deadline=None)
@given(units_st, links_st)
def test_everything_is_kept_where_it_fits(units: list[Unit], link: Link | None) -> None:
    least = peak(units, (KEEP,) * len(units), Room(0))
    decision = decide(units, Room(least), link)
    assert decision.fits
    assert decision.added_s == 0.0
    # A swap that is wholly hidden and costs the processor nothing would be as good; none is.
    assert all(
        c.way is Way.KEEP for c, u in zip(decision.choices, units, strict=True) if u.saved_bytes
    )


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.8])
@pytest.mark.parametrize("link", [None, LINK, Link(5e7, 5e7)])
def test_as_good_as_trying_everything(share: float, link: Link | None) -> None:
    units = [Unit(0.01 * (1 + i % 3), (8 + 5 * (i % 2)) * MIB, MIB) for i in range(6)]
    room = Room(int(share * peak(units, (KEEP,) * 6, Room(0))) + 20 * MIB)
    ways = [KEEP, DROP] if link is None else [KEEP, DROP, SWAP, Choice(Way.SWAP, 0.5)]
    tried = [predict(units, choices, room, link) for choices in product(ways, repeat=6)]
    best = min((d.added_s for d in tried if d.fits), default=None)
    decision = decide(units, room, link)
    assert decision.fits == (best is not None)
    if best is not None:
        assert decision.added_s <= best * 1.02 + 1e-9


def test_a_hidden_copy_beats_recomputing_and_a_slow_disk_does_not() -> None:
    units = [Unit(0.1, 50 * MIB, MIB) for _ in range(8)]
    room = Room(250 * MIB)
    fast = decide(units, room, Link(5e9, 5e9, 1.0, 2e10))
    assert {c.way for c in fast.choices} <= {Way.KEEP, Way.SWAP}
    slow = decide(units, room, Link(1e7, 1e7, 1.0, 1e10))
    assert {c.way for c in slow.choices} == {Way.KEEP, Way.RECOMPUTE}
    busy = decide(units, room, Link(2e8, 2e8, 0.0, 1e10))
    assert {c.way for c in busy.choices} == {Way.KEEP, Way.RECOMPUTE}


def test_the_last_unit_is_not_dropped_when_only_its_own_backward_matters() -> None:
    units = [Unit(0.1, 50 * MIB, 0) for _ in range(4)]
    decision = decide(units, Room(150 * MIB), None)
    assert [c.way for c in decision.choices].count(Way.KEEP) == 3


def test_keeping_is_weighed_against_what_it_displaces() -> None:
    units = [Unit(0.01, 50 * MIB, 0) for _ in range(4)]
    dear = Room(400 * MIB, free_bytes=0, displace_s_per_byte=1e-8)
    assert all(c.way is Way.RECOMPUTE for c in decide(units, dear, None).choices)
    cheap = Room(400 * MIB, free_bytes=0, displace_s_per_byte=1e-12)
    assert all(c.way is Way.KEEP for c in decide(units, cheap, None).choices)


PARTS = (Part("cheap", 0.03, 4 * MIB), Part("dear", 0.03, 16 * MIB), Part("none", 0.0001, 1))


def test_parts_are_kept_where_whole_units_do_not_fit() -> None:
    units = [Unit(0.1, 80 * MIB, 0, rerun_s=0.08, parts=PARTS) for _ in range(4)]
    little = decide(units, Room(80 * MIB + 4 * 4 * MIB), None)
    assert all(c.way is Way.RECOMPUTE and "cheap" in c.parts for c in little.choices[:3])
    assert all("none" not in c.parts for c in little.choices)
    more = decide(units, Room(80 * MIB + 4 * 20 * MIB), None)
    assert more.added_s < little.added_s < 4 * 0.08
    for found in (little, more):
        assert predict(units, found.choices, Room(80 * MIB + 4 * 20 * MIB)).added_s == (
            pytest.approx(found.added_s)
        )
    none = decide(units, Room(80 * MIB), None)
    assert none.added_s == pytest.approx(3 * 0.08)  # the last unit is kept for nothing


def test_parts_that_save_less_than_handling_them_takes_are_not_kept() -> None:
    units = [Unit(0.1, 80 * MIB, 0, rerun_s=0.08, parts=PARTS) for _ in range(4)]
    room = Room(80 * MIB + 4 * 20 * MIB)
    free = decide(units, room)
    assert any(len(c.parts) == 2 for c in free.choices)
    handled = [replace(u, handling_s=0.04) for u in units]  # one part saves 0.03, two 0.06
    for choice in decide(handled, room).choices:
        assert len(choice.parts) in (0, 2)
    assert predict(handled, free.choices, room).added_s == pytest.approx(
        free.added_s + 0.04 * sum(bool(c.parts) for c in free.choices)
    )
    dear = decide([replace(u, handling_s=0.07) for u in units], room)
    assert not any(c.parts for c in dear.choices)


def test_many_units_take_little_time() -> None:
    units = [Unit(0.01 + i * 1e-4, (40 + i % 7) * MIB, MIB) for i in range(126)]
    decision = decide(units, Room(2000 * MIB), LINK)
    assert decision.fits
    assert decision.peak_bytes <= 2000 * MIB


def test_predicts_the_peak() -> None:
    units = [Unit(0.01, 10 * MIB, MIB) for _ in range(4)]
    room = Room(100 * MIB, head_bytes=5 * MIB)
    for choices in ([KEEP] * 4, [DROP] * 4, [KEEP, DROP, KEEP, DROP]):
        expected = peak(units, tuple(choices), room)
        assert predict(units, choices, room).peak_bytes == expected


# -- two tiers below ---------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(units_st, rooms_st, links_of_two_st)
def test_the_room_below_is_kept_to(units: list[Unit], room: Room, link: Link) -> None:
    decision = decide(units, room, link)
    swapped = sum(
        int(c.swapped * u.saved_bytes) for u, c in zip(units, decision.choices, strict=True)
        if c.way is Way.SWAP
    )  # fmt: skip
    assert swapped <= link.room_bytes or link.beyond is not None
    again = predict(units, decision.choices, room, link)
    assert again.fits == decision.fits
    assert again.added_s == pytest.approx(decision.added_s)


@settings(max_examples=200, deadline=None)
@given(units_st, rooms_st, links_of_two_st, st.integers(0, 700 * MIB))
def test_a_tier_beyond_only_adds_seconds(
    units: list[Unit], room: Room, link: Link, moved: int
) -> None:
    near = Link(link.write_bytes_per_s, link.read_bytes_per_s, link.free_share)
    for two, one in zip(link.seconds(moved), near.seconds(moved), strict=True):
        assert two >= one
        assert (two == one) == (moved <= link.room_bytes or link.beyond is None)
    choices = decide(units, room, link).choices
    assert (
        predict(units, choices, room, near).added_s
        <= predict(units, choices, room, link).added_s + 1e-12
    )


def test_a_chunk_that_leaves_and_comes_back_costs_what_a_swapped_activation_does() -> None:
    """The processor's part; an idle disk hides its own."""
    machine = Machine(2e9, 2e9, 1e9, 1e9, 8e9)
    lanes = {name: SimpleNamespace(meter=Meter()) for name in ("read", "write")}
    engine: Any = SimpleNamespace(space=SimpleNamespace(lanes=lanes))
    below = DiskBelow(engine, machine, store=cast(Any, None))
    idle = below.displace_s_per_byte
    swapped = [Unit(1.0, MIB, 0, recomputable=False)]
    all_out = [Choice(Way.SWAP, 1.0)]
    assert idle * MIB == pytest.approx(
        predict(swapped, all_out, Room(4 * MIB), below.link()).added_s
    )
    lanes["read"].meter.moved_bytes = 10**12
    below.look(cast(Any, None), 0)  # what it moved cannot have left it idle
    assert below.displace_s_per_byte == pytest.approx(idle + 1 / 2e9 + 1 / 2e9)
