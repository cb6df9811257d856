"""Who sits where: every row gets one place, no more places are taken than there are."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.ending import Ending
from offload.places import BlockCost, BlockPlan, Places, choose_block
from offload.tiers.spec import MIB

COST = BlockCost(position_bytes=1000, token_bytes=5000, waiting_bytes=400, row_bytes=2000)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 4),
    st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_each_row_has_one_place_and_there_are_no_more_places_than_planned(
    lengths: list[int], batch: int, count: int, pads: bool, seed: int
) -> None:
    plan = BlockPlan(batch, count)
    by_row = {3 * i: length for i, length in enumerate(lengths)}
    places, draw = Places(by_row, plan, pads=pads), random.Random(seed)
    live: list[int] = []
    seen: list[int] = []
    while not places.over:
        begun = places.admit()
        for cohort in begun:
            assert 1 <= len(cohort) <= batch
            assert pads or len({by_row[row] for row in cohort}) == 1
            seen += cohort
        live += [row for cohort in begun for row in cohort]
        assert len(live) == places.live <= plan.rows
        assert live, "rows wait, and nobody has a place"
        for row in draw.sample(live, draw.randint(1, len(live))):
            live.remove(row)
            places.leave(row)
    assert sorted(seen) == sorted(by_row)
    assert [by_row[row] for row in seen] == sorted(lengths, reverse=True)


def test_freed_places_are_filled_when_they_are_enough_for_a_micro_batch() -> None:
    places = Places(dict.fromkeys(range(9), 5), BlockPlan(2, 2))
    assert [len(cohort) for cohort in places.admit()] == [2, 2]
    places.leave(0)
    assert not places.admit(), "one place is not enough for two rows"
    places.leave(2)
    assert [len(cohort) for cohort in places.admit()] == [2]
    assert places.live == 4


def test_rows_are_shared_out_evenly() -> None:
    places = Places(dict.fromkeys(range(9), 5), BlockPlan(8, 4))
    assert [len(cohort) for cohort in places.admit()] == [5, 4]


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=90), st.integers(1, 200),
    st.integers(1, 400),
)  # fmt: skip
def test_a_chosen_block_fits_and_a_larger_one_would_not(
    lengths: list[int], new_tokens: int, room_mib: int
) -> None:
    room = room_mib * MIB
    plan = choose_block(lengths, new_tokens, COST, room)
    assert plan.rows < len(lengths) + plan.micro_batches
    assert plan.rows == 1 or COST.of(plan, lengths, new_tokens) <= room
    if plan.rows < len(lengths) // 2 and plan.batch > 1:
        twice = BlockPlan(plan.batch, 2 * plan.micro_batches)
        assert COST.of(twice, lengths, new_tokens) > room // 2


def test_a_block_needs_a_row() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        BlockPlan(0, 2)


def spell(tokens: object) -> str:
    assert isinstance(tokens, list)
    return "".join(chr(96 + token) for token in tokens)


def test_a_row_ends_at_an_end_token_a_stop_string_its_length_or_the_last_position() -> None:
    ending = Ending(5, frozenset({26}), positions=12, stop=("de",), decode=spell)
    assert ending.reason(3, [1, 2]) is None
    assert ending.reason(3, [1, 26]) == "eos"
    assert ending.reason(3, [1, 4, 5]) == "stop"
    assert ending.reason(3, [1, 2, 3, 1, 2]) == "length"
    assert ending.reason(10, [1, 2]) == "length"
    assert ending.text([1, 26], "eos") == "a"
    assert ending.text([1, 4, 5], "stop") == "a"
    assert ending.text([1, 2], "length") == "ab"


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="need a tokenizer"):
        Ending(5, stop=("x",))
