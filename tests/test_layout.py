"""Layouts, whatever the sizes: every element has one place, aligned, and chunks tile the run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.tiers.layout import (
    PAGE_ELEMENTS,
    align_elements,
    choose_chunk_bytes,
    lay_out,
)
from offload.tiers.spec import KIB, MIB

sizes = st.lists(
    st.one_of(st.integers(0, 3), st.integers(0, 30_000), st.sampled_from([64, 4096, 8192])),
    max_size=12,
)
ALIGN_ELEMENTS = 64  # 64 bytes even where elements are single bytes
chunk_sizes = st.integers(1, 5).map(lambda pages: pages * PAGE_ELEMENTS)


@given(sizes, chunk_sizes)
def test_tensors_are_aligned_and_do_not_overlap(numels: list[int], chunk: int) -> None:
    layout = lay_out(numels, chunk)
    end = 0
    for start, numel in zip(layout.starts, numels, strict=True):
        assert start % ALIGN_ELEMENTS == 0
        assert start >= end
        assert start - end < 2 * ALIGN_ELEMENTS, "needless waste"
        end = start + numel
    assert end <= layout.total_elements
    assert layout.total_elements % PAGE_ELEMENTS == 0
    assert layout.total_elements - end < PAGE_ELEMENTS + ALIGN_ELEMENTS


@given(sizes, chunk_sizes)
def test_chunks_tile_the_run(numels: list[int], chunk: int) -> None:
    layout = lay_out(numels, chunk)
    at = 0
    for c in range(layout.chunks):
        start, stop = layout.chunk_range(c)
        assert start == at
        assert 0 < stop - start <= chunk
        assert (stop - start) % PAGE_ELEMENTS == 0
        at = stop
    assert at == layout.total_elements


@given(sizes, chunk_sizes)
def test_pieces_cover_each_element_once(numels: list[int], chunk: int) -> None:
    layout = lay_out(numels, chunk)
    reached = [0] * len(numels)
    for c in range(layout.chunks):
        lo, hi = layout.chunk_range(c)
        for piece in layout.pieces(c):
            begin = layout.starts[piece.tensor]
            assert piece.start == reached[piece.tensor], "in order, without gap or overlap"
            assert lo <= begin + piece.start < begin + piece.stop <= hi
            assert c in layout.chunks_of(piece.tensor)
            reached[piece.tensor] = piece.stop
    assert reached == numels


@given(sizes, chunk_sizes)
def test_cuts_within_a_tensor_leave_vector_kernels_alone(numels: list[int], chunk: int) -> None:
    layout = lay_out(numels, chunk)
    for c in range(layout.chunks):
        for piece in layout.pieces(c):
            assert piece.start % ALIGN_ELEMENTS == 0
            assert piece.stop % ALIGN_ELEMENTS == 0 or piece.stop == numels[piece.tensor]


@given(sizes, chunk_sizes)
def test_chunks_of_a_tensor_are_those_with_its_pieces(numels: list[int], chunk: int) -> None:
    layout = lay_out(numels, chunk)
    for tensor, numel in enumerate(numels):
        holding = [
            c for c in range(layout.chunks) if any(p.tensor == tensor for p in layout.pieces(c))
        ]
        assert len(layout.chunks_of(tensor)) >= 1
        if numel:
            assert holding == list(layout.chunks_of(tensor))


@given(sizes, chunk_sizes, chunk_sizes)
def test_offsets_do_not_depend_on_the_cut(numels: list[int], one: int, other: int) -> None:
    assert lay_out(numels, one).starts == lay_out(numels, other).starts


@pytest.mark.parametrize("chunk", [0, -4096, 4095, 100])
def test_odd_chunk_sizes_are_refused(chunk: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        lay_out([10], chunk)


@given(st.integers(1, 2**40), st.integers(2, 6))
def test_chosen_chunk_leaves_room_for_six_sets(budget: int, copies: int) -> None:
    size, half = choose_chunk_bytes(budget, copies), budget / 2
    assert 16 * KIB <= size <= 64 * MIB
    assert size & (size - 1) == 0
    sets = 3 if size == 2 * MIB else 6  # a huge page is not cut for the sake of more
    assert size == 16 * KIB or sets * copies * size <= half
    if size < 32 * MIB:  # and no smaller than it must be
        assert 6 * copies * (2 * size) > half
    assert size != MIB or 3 * copies * 2 * MIB > half
    assert (size == 64 * MIB) == (6 * copies * 256 * MIB <= half)


@pytest.mark.parametrize(("itemsize", "elements"), [(8, 64), (4, 64), (2, 128), (1, 256)])
@given(numels=sizes)
def test_narrow_elements_are_aligned_in_bytes(
    itemsize: int, elements: int, numels: list[int]
) -> None:
    assert align_elements(itemsize) == elements
    layout = lay_out(numels, PAGE_ELEMENTS, align=elements)
    assert all(start * itemsize % 256 == 0 for start in layout.starts)
