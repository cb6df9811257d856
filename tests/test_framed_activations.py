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
from offload.tiers.spec import KIB, MIB
from tests.blocks import Block, Stack, batch, start, stats, train
from tests.framed import MACHINE, Watched, adamw, tuning

ROWS = 64
LEAST = {"recompute": "480KiB", "swap": "640KiB"}  # of the device; keeping all takes 1.4 MiB
SETTINGS = ["recompute", "swap"]


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
        folder = None if options.pop("nowhere", False) else tmp_path / f"spill{len(opened)}"
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
    found = stats(watched.runtime)
    assert set(found["ways"]) == {setting}
    assert (found["swapped_bytes"] > 10 * MIB) == (setting == "swap")
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
    found = stats(watched.runtime)
    if checkpointing != "off":
        assert set(found["saved_bytes"]) == {0}, "those units are the user's"
    # Mixtral's layers carry hooks of transformers', which are not to run twice: swapped instead.
    swaps = checkpointing == "off" and "swap" in (setting, "swap" if name == "mixtral" else "")
    assert (found["swapped_bytes"] > 0) == swaps


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


# -- the choice per unit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "fits"), [("4MiB", True), ("1100KiB", False), ("800KiB", False)]
)
def test_auto_keeps_what_fits(
    zoo: Any, wrapped: Any, plain: list[Any], memory: str, fits: bool
) -> None:
    model, optimizer = start()
    watched = wrapped("auto", model, optimizer, memory=memory, host="4MiB", how=tuning(None))
    assert zoo.same(train(model, optimizer, rows=ROWS), plain)
    ledger = watched.device.engine.ledger
    assert ledger.peak_bytes <= ledger.budget_bytes
    assert ledger.other_bytes == 0
    found = stats(watched.runtime)
    assert (set(found["ways"]) == {"keep"}) == fits
    assert found["forecast_peak_bytes"] <= ledger.capacity_bytes
    assert watched.device.engine.counters.evictions > 100


def test_what_is_below_a_device_is_measured(wrapped: Any) -> None:
    """A link as fast as copies were, into what the host has room for, with the disk beyond."""
    model, optimizer = start()
    watched = wrapped("auto", model, optimizer, memory="4MiB", host="4MiB", how=tuning(None))
    below = watched.runtime.parts.hooks.activations._chooser._below
    assert below.link() is None, "nothing was copied yet"
    train(model, optimizer, steps=2, rows=ROWS)
    link = below.link()
    up, down = (lane.meter for lane in (watched.device.bus.up, watched.device.bus.down))
    assert link.read_bytes_per_s == up.moved_bytes / up.busy_s
    assert link.write_bytes_per_s == down.moved_bytes / down.busy_s
    host = watched.runtime.parts.engine
    chunks = sum(c.size_bytes for c in host.space.chunks)
    assert 0 <= link.room_bytes <= max(host.ledger.capacity_bytes - chunks, 0)
    assert link.beyond.write_bytes_per_s == MACHINE.write_bytes_per_s
    assert 0 < link.free_share <= 1 or below._busy == 1


# -- where swapped bytes go --------------------------------------------------------------------


@pytest.mark.parametrize(("host", "on_disk"), [("4MiB", False), ("500KiB", True)])
def test_the_host_holds_what_it_has_room_for(
    zoo: Any, wrapped: Any, plain: list[Any], host: str, on_disk: bool
) -> None:
    """Weights are evicted for it; what still finds no room goes to the spill file."""
    model, optimizer = start()
    watched = wrapped("swap", model, optimizer, host=host, how=tuning(None))
    assert zoo.same(train(model, optimizer, rows=ROWS), plain)
    ledger = watched.runtime.parts.engine.ledger
    assert ledger.peak_bytes <= ledger.budget_bytes
    assert bool(stats(watched.runtime)["disk_bytes"]) is on_disk
    assert ledger.peak_other_bytes > 256 * KIB
    assert watched.runtime.parts.engine.counters.evictions > 100
    staging_bytes = 2 * 64 * KIB if on_disk else 0
    assert ledger.other_bytes == staging_bytes


def test_without_a_disk_a_refusal_names_both_tiers(zoo: Any, wrapped: Any) -> None:
    expected = train(*start(), steps=3, rows=ROWS)
    model, optimizer = start()
    device, optimizer_of = "640KiB", optimizer
    watched = wrapped("swap", model, optimizer_of, memory=device, host="24MiB", nowhere=True)
    assert zoo.same(train(model, optimizer, steps=3, rows=ROWS), expected)
    assert stats(watched.runtime)["disk_bytes"] == 0
    host = watched.runtime.parts.engine.ledger
    small = host.budget_bytes - host.room_bytes + 256 * KIB
    model, optimizer = start()
    watched = wrapped("swap", model, optimizer, memory="2MiB", host=small, nowhere=True)
    assert zoo.same(train(model, optimizer, steps=3, rows=ROWS), expected)
    model, optimizer = start()
    wrapped("swap", model, optimizer, memory=device, host=small, nowhere=True)
    with pytest.raises(
        offload.BudgetError, match=r"device tier.*more host_memory.*host tier.*or a disk="
    ):
        train(model, optimizer, steps=3, rows=ROWS)


def test_a_storage_leaves_once(wrapped: Any) -> None:
    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.exp(self.up(x))  # its result is saved, by itself and by what follows
            return x + torch.tanh(self.down(torch.sin(h) * h.view(-1).view_as(h)))

    model = Stack()
    model.blocks = nn.ModuleList(Twice() for _ in range(3))
    watched = wrapped("swap", model, adamw(model), memory="4MiB")
    loss = model(batch(0, ROWS))
    visits = [ref() for ref in watched.runtime.parts.hooks.activations._pass.visits]
    for visit in visits:
        sizes = [p.size_bytes for ref in visit.parked if (p := ref()) is not None]
        wide, narrow = 4 * 64 * ROWS * 4, 64 * ROWS * 4
        assert sizes == [wide] * 3 + [narrow], "exp's result, sin's, their product, and tanh's"
    loss.backward()


def test_bytes_that_do_not_arrive_are_an_error(
    wrapped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = start()
    watched = wrapped("swap", model, optimizer, memory="4MiB")  # copies are not waited for
    copier, area = type(watched.device.bus.copier), watched.runtime.parts.hooks.activations._area

    def broken(*_: Any) -> None:
        raise OSError("the bus is gone")

    loss = model(batch(0, ROWS))
    monkeypatch.setattr(copier, "download", broken)
    with pytest.raises(offload.errors.SpillError, match="the bus is gone"):
        while_there_is_room_to_gain(area)
    del loss


def while_there_is_room_to_gain(area: Any) -> None:
    while area.relieve():
        pass


def test_what_was_let_go_of_elsewhere_is_room_when_room_is_asked_for(wrapped: Any) -> None:
    model, optimizer = start()
    watched = wrapped("keep", model, optimizer, memory="4MiB")
    engine = watched.device.engine
    engine.take_other(64 * KIB, "what autograd's thread will let go of")
    room_bytes = engine.ledger.room_bytes
    assert not engine.tenants.relieve(True)
    engine.given_back.append(64 * KIB)
    assert engine.tenants.relieve(False)
    assert engine.ledger.room_bytes == room_bytes + 64 * KIB


# -- nothing is left --------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("where", ["forward", "backward", "rerun", "dropped"])
def test_a_step_that_is_cut_short(
    zoo: Any, wrapped: Any, plain: list[Any], setting: str, where: str
) -> None:
    model, optimizer = start()
    watched = wrapped(setting, model, optimizer, memory="800KiB")  # torch holds a failed graph
    for _ in range(3):
        cut_short(model, where)
    model(batch(0, ROWS)).backward()  # lets go of the graph that failed
    optimizer.zero_grad()
    gc.collect()
    for buffer, value in zip(model.buffers(), Stack().buffers(), strict=True):
        buffer.copy_(value)
    assert zoo.same(train(model, optimizer, rows=ROWS), plain)
    watched.check_tiers()
    assert watched.device.engine.ledger.other_bytes == 0
    staging_bytes = 2 * 64 * KIB if stats(watched.runtime)["disk_bytes"] else 0
    assert watched.runtime.parts.engine.ledger.other_bytes == staging_bytes


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


@pytest.mark.parametrize("memory", ["1600KiB", "64MiB"], ids=["some", "all"])
@pytest.mark.parametrize("setting", [*SETTINGS, "auto"])
def test_beside_weights_that_live_on_the_device(
    zoo: Any, wrapped: Any, setting: str, memory: str
) -> None:
    found = []
    for residents in (False, True):
        model, optimizer = start()
        watched = wrapped(setting, model, optimizer, how=tuning(residents=residents),
                          memory=memory, host="1MiB")  # fmt: skip
        found.append(train(model, optimizer, rows=ROWS))
        device = watched.runtime.stats()["tiers"]["device"]
        if setting == "recompute" or memory == "64MiB":  # others may take the room themselves
            assert (device["resident_bytes"] > 0) is residents
        assert device["peak_bytes"] <= device["budget_bytes"]
        assert watched.device.engine.ledger.other_bytes == 0
    assert zoo.same(*found)
