"""Codecs of optimizer state: unbiased, fixed points, and the same bits however they are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offload.errors import OffloadError
from offload.optim.codecs import BLOCK_ELEMENTS, Bfloat16, Blockwise, Noise, noise_table

F32 = torch.float32


def test_stochastic_rounding_is_unbiased() -> None:
    table, steps = noise_table(), 4096
    values = torch.randn(512, generator=torch.Generator().manual_seed(0))
    stored, codec = torch.empty(512, dtype=torch.bfloat16), Bfloat16(F32)
    total = torch.zeros(512, dtype=torch.float64)
    below = (values.view(torch.int32) & -65536).view(F32)
    ulp = ((values.view(torch.int32) & -65536) + 65536).view(F32) - below
    for step in range(steps):
        codec.narrow(values, [stored], Noise(table, step * 7919, 0))
        up = (stored.float() - below) / ulp
        assert set(up.tolist()) <= {0.0, 1.0}, "not one of the two neighbours"
        total += up
    exact = ((values - below) / ulp).double()
    sigmas = (total / steps - exact) / (exact * (1 - exact) / steps).sqrt().clamp(min=1e-9)
    assert sigmas.abs().max() < 5.5
    assert 0.8 < sigmas.std() < 1.2  # independent from step to step: no more and no less
    assert abs(sigmas.mean()) < 0.2  # and from element to element


def test_to_nearest_a_second_moment_stands_still() -> None:
    ends = []
    for rounded in (True, False):
        kept, codec = torch.ones(4096, dtype=torch.bfloat16), Bfloat16(F32)
        for step in range(1000):
            values = codec.widen([kept]) * 0.999
            noise = Noise(noise_table(), step << 20, 0) if rounded else None
            codec.narrow(values, [kept], noise)
        ends.append(kept.float().mean().item())
    assert ends[0] == pytest.approx(0.999**1000, rel=0.01)
    assert ends[1] == 1.0


def test_the_table_holds_every_number_once() -> None:
    assert torch.equal(noise_table()[:65536].sort().values, torch.arange(65536).int())


@pytest.mark.parametrize("codec", [Bfloat16(F32), Blockwise(F32, True), Blockwise(F32, False)])
def test_cuts_and_generators_do_not_matter(codec: Any) -> None:
    values = torch.randn(200_001).abs()
    before = torch.get_rng_state()
    whole, cut = _stores(codec, 200_001), _stores(codec, 200_001)
    codec.narrow(values, whole, Noise(noise_table(), 5, 0))
    for start in range(0, 200_001, 256 * 37):
        stop = min(start + 256 * 37, 200_001)
        codec.narrow(
            values[start:stop], _at(codec, cut, start, stop), Noise(noise_table(), 5, start)
        )
    assert torch.equal(codec.widen(whole), codec.widen(cut))
    assert torch.equal(torch.get_rng_state(), before)


def _stores(codec: Any, numel: int) -> list[Tensor]:
    return [torch.empty(-(-numel // p.elements), dtype=p.dtype) for p in codec.parts.values()]


def _at(codec: Any, stores: list[Tensor], start: int, stop: int) -> list[Tensor]:
    parts = codec.parts.values()
    return [
        t[start // p.elements : -(-stop // p.elements)] for t, p in zip(stores, parts, strict=True)
    ]


def test_what_is_not_finite_stays_so() -> None:
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -8388608], dtype=torch.int32)
    values = torch.cat([odd.view(F32), torch.ones(3)])
    for step in range(64):
        stored = torch.empty(8, dtype=torch.bfloat16)
        Bfloat16(F32).narrow(values, [stored], Noise(noise_table(), step, 0))
        assert not stored[:5].isfinite().any()
        assert stored[:2].isnan().all()
        assert torch.equal(stored[3:].float(), values[3:])
    codec = Blockwise(F32, True)
    stores = _stores(codec, 512)
    codec.narrow(torch.cat([values, torch.ones(504)]), stores, None)
    assert codec.widen(stores)[:256].isnan().all()
    assert torch.equal(codec.widen(stores)[256:], torch.ones(256))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("numel", [1, 255, 256, 1000])
def test_blocks_round_to_the_nearest_code(signed: bool, numel: int) -> None:
    generator = torch.Generator().manual_seed(numel)
    values = torch.randn(numel, generator=generator) * torch.logspace(-6, 0, numel)
    values = values if signed else values.square()
    codec = Blockwise(F32, signed)
    stores = _stores(codec, numel)
    codec.narrow(values, stores, None)
    scales = stores[1].repeat_interleave(BLOCK_ELEMENTS)[:numel]
    wide = codec.widen(stores)
    root = (lambda x: (x.abs() / scales).sqrt()) if signed else (lambda x: (x / scales) ** 0.25)
    steps = 127 if signed else 255
    tolerance = torch.full((numel,), 0.501 / steps)
    if not signed:
        tolerance[root(values) < 1 / steps] = 1 / steps  # none becomes zero
        assert (wide > 0).all()
    assert ((root(wide) - root(values)).abs() <= tolerance).all()
    again = _stores(codec, numel)
    codec.narrow(wide, again, None)
    assert all(torch.equal(a, b) for a, b in zip(stores, again, strict=True)), "not a fixed point"
    codec.narrow(torch.zeros(numel), stores, None)
    assert torch.equal(codec.widen(stores), torch.zeros(numel))


def test_negative_values_where_there_were_none_are_an_error() -> None:
    codec = Blockwise(F32, False)
    with pytest.raises(OffloadError, match="negative now"):
        codec.narrow(torch.tensor([1.0, -1e-9]), _stores(codec, 2), None)
