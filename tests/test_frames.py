"""Weights computed with in frames: same bits as the unwrapped run, on an emulated device.

Frames are poisoned when freed and rotate, copies complete late and out of order, and both the
arena and the host are too small for the model, so every test runs all three tiers.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from offload.steps import Kind
from offload.tiers.arena import DeviceArena, PageMemory
from offload.tiers.spec import KIB
from tests.framed import Watched, adamw, seeded, tuning
from tests.test_gpu_promises import mlp

STEPS = 4

# name, recomputation: least device memory that works, and a little
MEMORY = {
    ("llama", "off"): "420KiB",
    ("llama", "reentrant"): "200KiB",
    ("llama", "non-reentrant"): "200KiB",
    ("llama-tied", "off"): "420KiB",
    ("gpt2", "off"): "540KiB",
    ("t5", "off"): "620KiB",
    ("vit", "off"): "200KiB",
    ("mixtral", "off"): "400KiB",
}


@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "planned"])
@pytest.mark.parametrize(("name", "recompute"), MEMORY)
def test_training_has_the_bits_of_the_unwrapped_run(
    name: str, recompute: str, prefetch: bool, zoo: Any, tmp_path: Path
) -> None:
    plain = zoo.build(name, recompute)
    reference = zoo.train(name, plain, adamw(plain), steps=STEPS)
    model = zoo.build(name, recompute)
    memory = MEMORY[name, recompute]
    watched = Watched(
        model, tmp_path, optimizer=adamw(model), memory=memory, how=tuning(prefetch=prefetch)
    )
    run = zoo.train(name, model, watched.optimizer, steps=STEPS)
    assert zoo.same(run, reference)
    watched.check_tiers()
    assert bool(watched.device.engine.counters.planned_loads) is prefetch
    watched.close()


def test_real_threads(zoo: Any, tmp_path: Path) -> None:
    plain = zoo.build("llama")
    reference = zoo.train("llama", plain, adamw(plain), steps=STEPS)
    model = zoo.build("llama")
    watched = Watched(model, tmp_path, optimizer=adamw(model), how=tuning(None))
    assert zoo.same(zoo.train("llama", model, watched.optimizer, steps=STEPS), reference)
    watched.check_tiers()
    watched.close()


class Odd(nn.Module):
    """Weights used in every way that is not ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(192, 48)
        self.first = nn.Parameter(torch.randn(96, 48) / 7)
        self.second = nn.Parameter(torch.randn(96, 48) / 7)
        self.frozen = nn.Parameter(torch.randn(48, 48) / 7, requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.conv = nn.Conv1d(48, 48, 3, padding=1)
        self.norm = nn.BatchNorm1d(48)
        self.fail = False

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.emb(input_ids)
        x = torch.tanh(x @ self.first.t() @ self.second)
        x = x @ self.frozen
        if self.fail:
            raise ValueError("on purpose")
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = checkpoint(self.inner, x, use_reentrant=False)
        x = torch.tanh(x @ self.first.t() @ self.second)
        logits = F.linear(x, self.emb.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + self.empty.sum()

    def inner(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(x @ self.second.t() @ self.first)


def live(model: Odd, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Training with accumulation and an evaluation between forward and backward."""
    generator = torch.Generator().manual_seed(1)
    seen: list[Any] = []
    for i in range(6):
        ids = torch.randint(0, 192, (2, 12), generator=generator)
        loss = model(ids, ids)
        model.eval()
        with torch.no_grad():
            seen.append(model(ids, ids))
        model.train()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [*seen, {k: v.clone() for k, v in model.state_dict().items()}]


@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "planned"])
def test_odd_uses_of_weights(prefetch: bool, zoo: Any, tmp_path: Path) -> None:
    plain = seeded(Odd)
    reference = live(plain, adamw(plain))
    model = seeded(Odd)
    watched = Watched(
        model, tmp_path, optimizer=adamw(model), memory="150KiB", host="200KiB",
        how=tuning(prefetch=prefetch),
    )  # fmt: skip
    assert watched.optimizer is not None
    assert zoo.same(live(model, watched.optimizer), reference)
    watched.check_tiers()
    watched.close()


def test_exceptions_leave_everything_usable(zoo: Any, tmp_path: Path) -> None:
    plain = seeded(Odd)
    reference = live(plain, adamw(plain))
    model = seeded(Odd)
    watched = Watched(model, tmp_path, optimizer=adamw(model), memory="150KiB", host="200KiB")
    ids = torch.ones(2, 12, dtype=torch.long)
    model.fail = True
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            model(ids, ids)
        assert isinstance(model.first, nn.Parameter)
    model.fail = False
    handle = model.frozen.requires_grad_().register_hook(_raise)
    with pytest.raises(ValueError, match="in a hook"):
        model(ids, ids).backward()
    handle.remove()
    model.frozen.requires_grad_(False)
    assert isinstance(model.first, nn.Parameter)
    model.zero_grad()
    model.norm.reset_running_stats()
    assert watched.optimizer is not None
    assert zoo.same(live(model, watched.optimizer), reference)
    watched.close()


def _raise(grad: Tensor) -> None:
    raise ValueError("in a hook")


def test_weights_move_between_forward_and_backward(zoo: Any, tmp_path: Path) -> None:
    watched = Watched(zoo.build("llama"), tmp_path, how=tuning(prefetch=False))
    ids = torch.arange(1, 13)[None]
    loss = watched.model(input_ids=ids, labels=ids).loss
    before = {c: list(a) for c, a in watched.places.items()}
    loss.backward()
    again = [c for c, a in watched.places.items() if len(a) > len(before[c])]
    assert len(again) > 6
    assert any(watched.places[c][len(before[c])] != before[c][-1] for c in again)
    watched.close()


def test_trusting_versions_spares_uploads_and_sees_ordinary_writes(
    zoo: Any, tmp_path: Path
) -> None:
    plain = zoo.build("llama")
    reference = zoo.train("llama", plain, adamw(plain), steps=STEPS)
    uploads = []
    for trust in (False, True):
        model = zoo.build("llama")
        how = tuning(prefetch=False, trust_versions=trust)
        watched = Watched(model, tmp_path, optimizer=adamw(model), memory="1MiB", how=how)
        assert zoo.same(zoo.train("llama", model, watched.optimizer, steps=STEPS), reference)
        uploads.append(watched.device.engine.counters.demand_loads)
        ids = torch.arange(1, 9)[None]
        model.eval()
        with torch.no_grad():
            first = model(input_ids=ids).logits
            model.lm_head.weight.mul_(2)
            assert torch.equal(model(input_ids=ids).logits, first * 2)
        watched.close()
    assert uploads[1] < uploads[0] / 2


@pytest.mark.parametrize("trust", [False, True])
def test_what_only_the_next_pass_uses_comes_where_copies_outlive_passes(trust: bool) -> None:
    model = mlp()
    how = tuning(None, device_chunk_bytes=80 * KIB, chunk_bytes=64 * KIB, trust_versions=trust)
    watched = Watched(model, None, memory="300KiB", host="8MiB", how=how)
    engine = watched.device.engine
    with torch.no_grad():
        for _ in range(4):
            model(torch.ones(8, 128))
    trace = watched.device.steps.tracks[Kind.INFER].trace
    assert trace is not None
    first = [n.chunk for m in trace.moments[:2] for n in m.needs]
    there = {*engine.moves.resident, *(c.id for c in engine.frames.loads())}
    assert there.issuperset(first) is trust
    assert bool(there) is trust
    assert engine.counters.planned_loads > 0
    watched.close()


def test_a_frame_is_free_only_when_no_tensor_refers_to_it() -> None:
    arena = DeviceArena(PageMemory(), poison=True)
    frame = arena.take(4096)
    arena.assign(frame, 7)
    tensor = arena.lend(frame)
    tensor.fill_(1)
    view, gone = tensor[8:16].view(torch.float32), weakref.ref(tensor)
    del tensor
    assert gone() is None
    arena.give(frame)
    assert (arena.idle_bytes, arena.viewed_bytes, arena.total_bytes) == (0, 4096, 4096)
    other = arena.take(4096)
    assert other.address != frame.address
    assert arena.owner_of(view) == 7
    assert view.view(torch.uint8).tolist() == [1] * 8
    del view
    assert arena.viewed_bytes == 0
    assert arena.idle_bytes == 4096
    again = arena.take(4096)
    assert again.address == frame.address
    assert set(arena.lend(again).tolist()) == {0xFF}
    arena.give(again)
    arena.give(other)
    arena.trim()
    assert arena.total_bytes == 0
