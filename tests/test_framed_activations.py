"""Activations run again or swapped where weights are in frames: same bits, within every budget.

The device is emulated, frames are poisoned and rotate, copies complete late and out of order, and
neither the arena nor the host has room for the weights.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import offload.visit
from offload.prefetch.trace import Phase
from offload.steps import Kind
from tests.blocks import Block, Stack, batch, start, stats, train
from tests.framed import Watched, adamw, tuning

ROWS = 64
LEAST = {"recompute": "480KiB"}  # of the device; keeping everything takes 1.4 MiB
SETTINGS = ["recompute"]


@pytest.fixture(autouse=True)
def small_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models: swap tiny tensors too."""
    monkeypatch.setattr(offload.visit, "LEAST_BYTES", 256)


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """What an unwrapped run gives."""
    return train(*start(), rows=ROWS)


@pytest.fixture
def wrapped(tmp_path: Path) -> Iterator[Any]:
    """Wraps models, and closes what a test leaves open."""
    opened: list[Watched] = []

    def make(setting: str, model: nn.Module, optimizer: Optimizer, **options: Any) -> Watched:
        folder = tmp_path / f"spill{len(opened)}"
        values: dict[str, Any] = {"memory": LEAST.get(setting, "700KiB"), "activations": setting}
        opened.append(Watched(model, folder, optimizer, **(values | options)))
        return opened[-1]

    yield make
    for watched in opened:
        watched.close()


# -- bits, in memory that keeping would not fit into ------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "planned"])
def test_random_numbers_and_buffers(
    zoo: Any, wrapped: Any, plain: list[Any], setting: str, prefetch: bool
) -> None:
    model, optimizer = start()
    watched = wrapped(setting, model, optimizer, how=tuning(prefetch=prefetch))
    assert zoo.same(train(model, optimizer, rows=ROWS), plain)
    watched.check_tiers()
    assert set(stats(watched.runtime)["ways"]) == {setting}
    assert watched.device.engine.ledger.other_bytes == 0


def test_keeping_does_not_fit_there(wrapped: Any) -> None:
    model, optimizer = start()
    wrapped("keep", model, optimizer)
    with pytest.raises(offload.BudgetError, match=r"device tier.*give offload\.wrap activations="):
        train(model, optimizer, rows=ROWS)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("gpt2", "off"), ("llama-tied", "off"), ("t5", "off"), ("mixtral", "off"),
     ("llama", "reentrant"), ("llama", "non-reentrant")],
)  # fmt: skip
def test_families(zoo: Any, wrapped: Any, setting: str, name: str, checkpointing: str) -> None:
    model = zoo.build(name, checkpointing)
    expected = zoo.train(name, model, adamw(model), steps=3)
    model = zoo.build(name, checkpointing)
    optimizer = adamw(model)
    memory = "400KiB" if name == "gpt2" else "560KiB"
    watched = wrapped(setting, model, optimizer, memory=memory)
    assert zoo.same(zoo.train(name, model, optimizer, steps=3), expected)
    watched.check_tiers()
    if checkpointing != "off":
        assert set(stats(watched.runtime)["saved_bytes"]) == {0}, "those units are the user's"


class Inner(Block):
    """Checkpoints a part of itself."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        part: Any = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return x + torch.tanh(part)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_a_unit(zoo: Any, wrapped: Any, setting: str, reentrant: bool) -> None:
    def build() -> tuple[Stack, Optimizer]:
        model = Stack()
        torch.manual_seed(6)
        model.blocks = nn.ModuleList(Inner() for _ in range(4))
        for block in model.blocks:
            vars(block)["reentrant"] = reentrant
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    expected = train(*build(), steps=3, rows=ROWS)
    model, optimizer = build()
    watched = wrapped(setting, model, optimizer, memory="700KiB")
    assert zoo.same(train(model, optimizer, steps=3, rows=ROWS), expected)
    assert watched.device.engine.counters.evictions > 20


class Careful(nn.Module):
    """Reads a weight where no gradients are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = self.up.weight.abs().sum().to(x.dtype)
        return x + torch.tanh(self.down(torch.relu(self.up(x / size))))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_read_without_gradients_come_from_frames(
    zoo: Any, wrapped: Any, dtype: torch.dtype | None
) -> None:
    def losses(setting: str) -> Any:
        model = Stack()
        model.blocks = nn.ModuleList(Careful() for _ in range(3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        wrapped(setting, model, optimizer, memory="2MiB", compute_dtype=dtype)
        return train(model, optimizer, steps=3, rows=ROWS)

    assert zoo.same(losses("recompute"), losses("keep"))


def test_the_trace_has_the_rerun(wrapped: Any) -> None:
    """Weights of a unit that runs again are fetched in the order of its forward pass."""
    model, optimizer = start()
    watched = wrapped("recompute", model, optimizer, how=tuning(device_chunk_bytes=1024))
    train(model, optimizer, steps=3, rows=ROWS)
    trace = watched.device.steps.tracks[Kind.TRAIN].trace
    assert trace is not None
    slots = watched.device.engine.frames.slots
    block: Any = model.blocks[2]
    up, down = (slots[p].chunk for p in (block.up.weight, block.down.weight))
    moments = [m for m in trace.moments if m.phase is Phase.BACKWARD]
    order = [n.chunk for m in moments for n in m.needs if n.chunk in (up, down)]
    assert order[:2] == [up, down]


# -- nothing is left --------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("where", ["forward", "backward", "rerun", "dropped"])
def test_a_step_that_is_cut_short(
    zoo: Any, wrapped: Any, plain: list[Any], setting: str, where: str
) -> None:
    model, optimizer = start()
    watched = wrapped(setting, model, optimizer, memory="700KiB")  # torch holds a failed graph
    for _ in range(3):
        cut_short(model, where)
    model(batch(0, ROWS)).backward()  # lets go of the graph that failed
    optimizer.zero_grad()
    gc.collect()
    for buffer, value in zip(model.buffers(), Stack().buffers(), strict=True):
        buffer.copy_(value)
    assert zoo.same(train(model, optimizer, rows=ROWS), plain)
    watched.check_tiers()
    for engine in (watched.device.engine, watched.runtime.parts.engine):
        assert engine.ledger.other_bytes == 0


class Stopped(Exception):  # noqa: N818
    """On purpose."""


def cut_short(model: Stack, where: str) -> None:
    def stop(*_: Any) -> None:
        raise Stopped

    block: Any = model.blocks[2]
    handle: Any = None
    if where == "forward":
        handle = model.last.register_forward_pre_hook(stop)
    elif where == "backward":
        handle = block.down.weight.register_hook(stop)
    try:
        loss = model(batch(0, ROWS))
        if where == "rerun":
            original, block.up.forward = block.up.forward, stop
        if where != "dropped":
            loss.backward()
    except Stopped:
        pass
    finally:
        if where == "rerun":
            block.up.forward = original
        if handle is not None:
            handle.remove()
