"""The pure parts of the KV cache: who keeps how much, and keys and values in few bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import OffloadError
from offload.kivi import Kivi, SquaredError
from offload.prefetch.cache import Line, choose_block_tokens, spread
from offload.tiers.spec import KIB, MIB

LINES = st.lists(
    st.builds(Line, st.integers(0, 4), st.sampled_from([4, 8])), min_size=1, max_size=4
)


def rests(lines: list[Line], keep: tuple[int, ...]) -> list[int]:
    return [(n.blocks - k) * n.block_bytes for n, k in zip(lines, keep, strict=True)]


@given(LINES, st.integers(0, 100))
@settings(deadline=None, max_examples=80)
def test_shares_fit_and_little_is_streamed(lines: list[Line], room: int) -> None:
    shares = spread(lines, room)
    whole = sum(line.size_bytes for line in lines)
    streamed = rests(lines, shares.keep)
    assert all(0 <= k <= n.blocks for n, k in zip(lines, shares.keep, strict=True))
    if whole <= room:
        assert (sum(streamed), shares.ahead_bytes) == (0, 0)
    elif max(line.size_bytes for line in lines) > room:
        assert sum(streamed) == whole
        assert shares.ahead_bytes >= max(line.block_bytes for line in lines)
    else:
        assert whole - sum(streamed) + max(streamed) <= room
        assert shares.ahead_bytes == max(streamed)
        # Of all choices that fit, with the largest rest read ahead, none streams much less:
        # what equal rests lose is less than one block of each line.
        every = itertools.product(*(range(n.blocks + 1) for n in lines))
        fits = (r for r in (rests(lines, k) for k in every) if whole - sum(r) + max(r) <= room)
        assert sum(streamed) <= min(map(sum, fits)) + sum(n.block_bytes for n in lines)


def test_equal_layers_keep_equal_shares() -> None:
    assert spread([Line(10, 4)] * 12, 240).keep in {(k,) * 12 for k in (3, 4)}


def test_blocks_that_fill_take_a_small_part_of_the_limit() -> None:
    tokens = choose_block_tokens(8 * KIB, 32, 512 * MIB)
    assert tokens * 8 * KIB == 2 * MIB
    assert 32 * choose_block_tokens(8 * KIB, 32, 64 * MIB) * 8 * KIB == 64 * MIB // 4
    assert choose_block_tokens(KIB, 32, 64 * 1024 * MIB) == 512
    assert choose_block_tokens(MIB, 32, MIB) == 1
    assert choose_block_tokens(MIB, 32, MIB, 32) == 32


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("dim", [8, 32, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coding_errs_by_half_a_step(bits: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    keys, values = (torch.randn(3, 2, 64, dim, generator=generator) for _ in range(2))
    keys[:, :, :, 1] += 8  # a large channel, as real keys have
    keys, values = keys.to(dtype), values.to(dtype)
    codec = Kivi(bits)
    size_bytes = codec.stored_bytes(keys.shape, values.shape)
    memory = torch.zeros(size_bytes + 64, dtype=torch.uint8)
    codec.store(keys, values, memory)
    assert not memory[size_bytes:].any()
    back = torch.empty_like(keys), torch.empty_like(values)
    codec.load(memory, *back)
    for x, decoded, axis in ((keys, back[0], 2), (values, back[1], 3)):
        group = 32 if x.shape[axis] % 32 == 0 else x.shape[axis]
        parts = x.float().unflatten(axis, (-1, group))
        spans = parts.amax(axis + 1, keepdim=True) - parts.amin(axis + 1, keepdim=True)
        worst = (parts - decoded.float().unflatten(axis, (-1, group))).abs()
        slack = 0.01 + (0.05 if dtype is torch.bfloat16 else 0.0)  # of float16, of the result
        assert (worst <= spans / (2**bits - 1) / 2 + slack).all()
    error = SquaredError()
    error.add(keys, back[0])
    assert error.relative is not None
    assert 0 < error.relative < {4: 0.01, 2: 0.1}[bits]


@pytest.mark.parametrize("bits", [4, 2])
def test_coding_is_small(bits: int) -> None:
    shape = torch.Size((2, 8, 64, 128))
    exact_bytes = 2 * shape.numel() * 2  # keys and values of two bytes
    assert Kivi(bits).stored_bytes(shape, shape) <= exact_bytes * (bits + 1) / 16


def test_constant_groups_are_exact() -> None:
    keys, values = torch.full((1, 1, 32, 8), 1.5), torch.zeros(1, 1, 32, 8)
    codec = Kivi(4)
    memory = torch.zeros(codec.stored_bytes(keys.shape, values.shape), dtype=torch.uint8)
    codec.store(keys, values, memory)
    back = torch.empty_like(keys), torch.empty_like(values)
    codec.load(memory, *back)
    assert torch.equal(back[0], keys)
    assert torch.equal(back[1], values)


def test_odd_dimensions_are_refused() -> None:
    with pytest.raises(OffloadError, match="multiple of 4"):
        Kivi(2).stored_bytes(torch.Size((1, 1, 32, 6)), torch.Size((1, 1, 32, 6)))
