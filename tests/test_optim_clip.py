"""Clipping inside the update equals clip_grad_norm_ and then step, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from offload.internals import fake_mode
from offload.optim.clip import GradNorms
from offload.optim.mirror import profile
from offload.optim.ram import RamStore
from offload.optim.step import ChunkedStep, Clip

SHAPES = ((65539,), (7, 13), (1,), (), (64, 32))


def make_params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in SHAPES]


def fill_grads(params: list[nn.Parameter], step: int) -> None:
    g = torch.Generator().manual_seed(step + 1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}])
def test_weights_equal_clip_then_step(flags: Any, max_norm: float) -> None:
    a, b = make_params(), make_params()
    plain, chunked = torch.optim.AdamW(a, **flags), torch.optim.AdamW(b[::-1], **flags)
    known = profile(chunked)
    clip = Clip(max_norm, tuple(b))
    store = RamStore(chunked, known, 22_000)
    work = ChunkedStep(chunked, known, store, clip=clip, piece_elements=1 << 14)
    for step in range(4):
        fill_grads(a, step)
        fill_grads(b, step)
        for p in b[: step + 1]:
            clip.norms.note(p)
        grads = [p.grad.clone() for p in b if p.grad is not None]
        total = clip_grad_norm_(a, max_norm)
        plain.step()
        chunked.step()
        assert work.last_total_norm is not None
        assert torch.equal(work.last_total_norm, total)
        for p, q, before in zip(a, b, grads, strict=True):
            assert torch.equal(p, q)
            assert q.grad is not None
            assert torch.equal(q.grad, before)  # left unclipped


def test_adafactor_is_clipped_whole() -> None:
    a, b = make_params(), make_params()
    plain: Any = torch.optim.Adafactor(a)
    chunked: Any = torch.optim.Adafactor(b)
    known = profile(chunked)
    ChunkedStep(chunked, known, RamStore(chunked, known), clip=Clip(0.5, tuple(b)))
    for step in range(3):
        fill_grads(a, step)
        fill_grads(b, step)
        clip_grad_norm_(a, 0.5)
        plain.step()
        chunked.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_norm_is_used_only_for_the_gradient_it_was_taken_of() -> None:
    params = make_params()
    norms = GradNorms()
    for change in ("none", "in place", "replaced", "accumulated", "removed"):
        fill_grads(params, 0)
        for p in params:
            norms.note(p)
        first = params[0]
        assert first.grad is not None
        if change == "in place":
            first.grad.mul_(3)
        elif change == "replaced":
            first.grad = first.grad * 3
        elif change == "accumulated":
            torch.autograd.backward((first * 2).sum())
        elif change == "removed":
            first.grad = None
        total, coefficient = norms.coefficient(params, 1.0)
        expected = clip_grad_norm_(params, 1.0)
        assert torch.equal(total, expected), change
        assert torch.equal(coefficient, (1.0 / (expected + 1e-6)).clamp(max=1.0))


def test_a_noted_norm_is_not_taken_again() -> None:
    params = make_params()
    fill_grads(params, 0)
    norms = GradNorms()
    for p in params:
        norms.note(p)
    expected = norms.coefficient(params, 1.0)[0]
    for p in params:
        assert p.grad is not None
        p.grad.data.fill_(float("nan"))  # unseen by autograd: as when the bytes have left
    assert torch.equal(norms.coefficient(params, 1.0)[0], expected)
    norms.forget()
    assert norms.coefficient(params, 1.0)[0].isnan()


def test_mixed_dtypes_and_no_gradients() -> None:
    params = make_params() + make_params(torch.bfloat16)
    norms = GradNorms()
    assert [t.item() for t in norms.coefficient(params, 1.0)] == [0.0, 1.0]
    fill_grads(params, 0)
    total, _ = norms.coefficient(params, 1.0)
    assert torch.equal(total, clip_grad_norm_(params, 1.0))


@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_gradients_on_two_devices_are_multiplied_by_one_number(first: str) -> None:
    """Fake tensors know of devices that are not there, and refuse what those would."""
    with fake_mode():
        places = [first, "cuda" if first == "cpu" else "cpu"]
        params = [nn.Parameter(torch.ones(8, device=place)) for place in places]
        params.append(nn.Parameter(torch.ones(8, device="cuda", dtype=torch.bfloat16)))
        for p in params:
            p.grad = torch.ones_like(p)
        _, coefficient = GradNorms().coefficient(params, 0.1)
        for p in params:
            assert p.grad is not None
            assert (p.grad * coefficient).device == p.device
        cuda = [p for p in params if p.device.type == "cuda"]
        _, coefficient = GradNorms().coefficient(cuda, 0.1)
        assert coefficient.device.type == "cuda", "needless waiting"
