"""The CUDA-only code, run on a CPU under fakes: every access is ordered, and memory is exact.

No GPU is needed; what only a GPU can show is in test_gpu*.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.swap_bus import Returned
from offload.tiers.copy import STAGING_BUFFERS, STAGING_BYTES, CudaCopier, Mark
from offload.tiers.spec import KIB, MIB
from tests import fakecuda
from tests.blocks import Stack, start, stats
from tests.blocks import train as train_blocks
from tests.framed import Keeper, Watched, adamw, tuning

HOST = "49MiB"  # the staging of both directions is 48


@pytest.fixture
def small_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models: swap tiny tensors too."""
    monkeypatch.setattr("offload.visit.LEAST_BYTES", 256)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> fakecuda.Device:
    return fakecuda.install(monkeypatch)


def train(zoo: Any, name: str, folder: Path | None, steps: int = 4, **how: Any) -> Any:
    """Without a folder there is no disk, and homes never move."""
    model = zoo.build(name)
    watched = Watched(
        model, folder, optimizer=adamw(model), memory="420KiB", host=HOST if folder else "64MiB",
        how=tuning(None, **how),
    )  # fmt: skip
    run = zoo.train(name, model, watched.optimizer, steps=steps)
    watched.close()
    return run


@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "planned"])
def test_no_access_is_left_to_chance(
    prefetch: bool, fake: fakecuda.Device, zoo: Any, tmp_path: Path
) -> None:
    plain = zoo.build("llama-tied")
    reference = zoo.train("llama-tied", plain, adamw(plain), steps=4)
    assert zoo.same(train(zoo, "llama-tied", tmp_path, prefetch=prefetch), reference)
    assert len(fake.written) > 3
    assert fake.races == []
    assert fake.runtime.pinned == {}, "what was pinned is released"


def regions(run: Any) -> list[int]:
    """Bytes of the homes that copies go from and to."""
    families = run.parts.binding.families
    return [r.layout.total_elements * r.itemsize for f in families for r in (f.weights, f.grads)]


@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "planned"])
def test_homes_that_never_move_are_copied_straight(
    prefetch: bool, fake: fakecuda.Device, zoo: Any
) -> None:
    plain = zoo.build("llama")
    reference = zoo.train("llama", plain, adamw(plain), steps=4)
    assert zoo.same(train(zoo, "llama", None, prefetch=prefetch), reference)
    assert min(fake.straight["up"], fake.straight["down"]) > 20
    assert fake.races == []
    assert fake.runtime.pinned == {}, "what was pinned is released"


def test_gradients_land_in_pinned_homes_that_nobody_holds(fake: fakecuda.Device) -> None:
    model = Keeper()
    watched = Watched(model, None, optimizer=adamw(model), host="64MiB", how=tuning(None))
    run, homes = watched.runtime, watched.runtime.parts.binding.homes
    staging = 2 * STAGING_BUFFERS * STAGING_BYTES
    assert sorted(fake.runtime.pinned.values())[: -2 * STAGING_BUFFERS] == sorted(regions(run))
    assert run.stats()["device"]["pinned_bytes"] == staging + sum(regions(run))

    def backward() -> list[torch.Tensor]:
        model(torch.ones(4, 64)).sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    first = backward()
    assert all(home.grad_is_home for home in homes.values())
    kept = [grad.clone() for grad in first]
    landed = fake.straight["down"]
    assert landed == len(first)
    again = backward()  # is added to what is there
    assert all(torch.equal(a, 2 * k) for a, k in zip(again, kept, strict=True))
    assert fake.straight["down"] == landed
    model.zero_grad()
    other = backward()  # the homes are held by `first`, which must not change
    assert fake.straight["down"] == landed
    assert all(torch.equal(a, 2 * k) for a, k in zip(first, kept, strict=True))
    assert all(torch.equal(o, k) for o, k in zip(other, kept, strict=True))
    watched.close()
    assert fake.runtime.pinned == {}


def test_homes_that_cannot_be_pinned_go_through_staging(fake: fakecuda.Device, zoo: Any) -> None:
    fake.runtime.limit_bytes = 2 * STAGING_BUFFERS * STAGING_BYTES + 400 * KIB
    plain = zoo.build("llama")
    reference = zoo.train("llama", plain, adamw(plain), steps=2)
    with pytest.warns(RuntimeWarning, match="could not be pinned.*CUDA error 2") as said:
        assert zoo.same(train(zoo, "llama", None, steps=2), reference)
    assert len(said) == 1
    assert not fake.straight["up"] + fake.straight["down"]
    assert fake.races == []
    assert fake.runtime.pinned == {}


def test_narrower_frames_are_filled_through_staging(fake: fakecuda.Device) -> None:
    model = Keeper()
    watched = Watched(
        model, None, optimizer=adamw(model), host="64MiB", how=tuning(None),
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    assert len(fake.runtime.pinned) == 2 * STAGING_BUFFERS, "homes that are converted from"
    model(torch.ones(4, 64)).sum().backward()
    assert not fake.straight["up"] + fake.straight["down"]
    watched.close()


def test_only_homes_that_are_not_converted_are_pinned(fake: fakecuda.Device) -> None:
    model = Keeper()
    model.layers[:3].to(torch.bfloat16)
    watched = Watched(
        model, None, optimizer=adamw(model), host="64MiB", how=tuning(None),
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    narrow, _ = watched.runtime.parts.binding.families
    assert narrow.params[0].dtype == torch.bfloat16
    homes = {r.address for r in (narrow.weights, narrow.grads) if r is not None}
    assert homes < set(fake.runtime.pinned)
    assert len(fake.runtime.pinned) == 2 * STAGING_BUFFERS + len(homes)
    model(torch.ones(4, 64)).sum().backward()
    assert fake.straight["up"]
    assert fake.straight["down"]
    assert fake.races == []
    watched.close()


def swap(model: Stack, optimizer: Any, folder: Path, host: str) -> Any:
    """Training with swapped activations."""
    watched = Watched(
        model, folder, optimizer, memory="640KiB", host=host, how=tuning(None), activations="swap"
    )
    found = train_blocks(model, optimizer, steps=3, rows=64)
    assert stats(watched.runtime)["swapped_bytes"] > MIB
    watched.close()
    return found


@pytest.mark.parametrize("host", ["52MiB", "50MiB"], ids=["host", "disk"])
def test_no_swapped_activation_is_left_to_chance(
    host: str, fake: fakecuda.Device, zoo: Any, tmp_path: Path, small_swaps: None
) -> None:
    reference = train_blocks(*start(), steps=3, rows=64)
    assert zoo.same(swap(*start(), tmp_path, host), reference)
    assert fake.races == []
    assert fake.runtime.pinned == {}


def _used_at_once(self: Returned) -> Any:
    """Compute does not wait for what came back."""
    self._leases.bus.copier.arrive = lambda mark: None  # type: ignore[method-assign]
    return _memory(self)


_memory = Returned.memory


@pytest.mark.parametrize(
    ("name", "broken", "race"),
    [
        ("Returned.memory", _used_at_once, "read too early"),
        ("Mark", lambda _: Mark(), "overwritten too early"),
    ],
)
def test_a_missing_wait_of_what_comes_back_is_found(
    name: str, broken: Any, race: str, fake: fakecuda.Device, tmp_path: Path, small_swaps: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(f"offload.swap_bus.{name}", broken)
    swap(*start(), tmp_path, "52MiB")
    assert set(fake.races) == {race}


def _read_at_once(self: CudaCopier, mark: Mark) -> None:
    """Compute does not wait for the copy."""


def _write_at_once(self: Any, address: int) -> None:
    """The copy does not wait for compute."""


def _go_on(self: fakecuda.Event) -> None:
    """The host does not wait for what an event stands for."""


@pytest.mark.parametrize(
    ("on_disk", "owner", "method", "broken", "race"),
    [
        (True, fakecuda.Copier, "arrive", _read_at_once, "read too early"),
        (True, fakecuda.Memory, "vacant", _write_at_once, "overwritten too early"),
        (False, fakecuda.Memory, "vacant", _write_at_once, "overwritten too early"),
        (False, fakecuda.Event, "synchronize", _go_on, "a home was given back too early"),
        (False, fakecuda.Event, "synchronize", _go_on, "the host read too early"),
    ],
)
def test_a_missing_wait_is_found(
    on_disk: bool, owner: type, method: str, broken: Any, race: str, fake: fakecuda.Device,
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(owner, method, broken)
    train(zoo, "llama", tmp_path if on_disk else None, steps=2)
    assert race in fake.races


def test_a_gradient_that_leaves_without_a_wait_is_found(fake: fakecuda.Device) -> None:
    copier = fakecuda.Copier(fake)
    grad, there = torch.arange(6.0), torch.zeros(6)
    copier.download(grad, there, copier.ready())
    assert fake.races == []
    assert torch.equal(grad, there)
    mark = copier.ready()
    mark.vacant = None
    copier.download(grad, there, mark)
    assert fake.races == ["a gradient left too early"]
    copier.close()


def test_pinned_bytes_are_exact_and_debited(
    fake: fakecuda.Device, zoo: Any, tmp_path: Path
) -> None:
    wanted = [STAGING_BYTES] * 2 * STAGING_BUFFERS
    model = zoo.build("llama")
    with pytest.raises(offload.BudgetError, match="staging for copies"):
        Watched(model, tmp_path, host="48MiB")
    fake.runtime.pinned.clear()
    watched = Watched(zoo.build("llama"), tmp_path, host=HOST)
    assert sorted(fake.runtime.pinned.values()) == wanted
    assert watched.runtime.parts.engine.ledger.fixed_bytes >= sum(wanted)
    watched.close()


def test_pages_that_cannot_be_pinned_are_said_and_work(
    fake: fakecuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.runtime.code = 304
    with pytest.warns(RuntimeWarning, match="could not be pinned.*CUDA error 304"):
        copier = fakecuda.Copier(fake)
    source = torch.arange(5 * MIB, dtype=torch.float32)  # more than all buffers hold
    target, back = torch.zeros(5 * MIB, dtype=torch.bfloat16), torch.zeros(5 * MIB)
    copier.upload(source, target, Mark())
    assert torch.equal(target, source.bfloat16())
    copier.download(target, back, copier.ready())
    assert torch.equal(back, target.float())
    copier.close()


def test_frames_take_what_the_allocator_counts(fake: fakecuda.Device) -> None:
    memory = fakecuda.Memory(fake)
    held = [memory.held_bytes(n) for n in (1, 512, MIB, MIB + 1, 64 * MIB)]
    assert held == [512, 512, MIB, 2 * MIB, 64 * MIB]


def test_a_pass_on_another_stream_waits_for_the_last(fake: fakecuda.Device) -> None:
    memory = fakecuda.Memory(fake)
    address = memory.allocate(512)
    fake.compute.tick()
    other = fakecuda.Stream()
    with fake.use(other):
        memory.follow()
    assert other.clock[id(fake.compute)] == fake.compute.clock[id(fake.compute)]
    memory.retire(address)
    event: Any = memory.vacant(address)
    assert event.seen[id(other)] > 0
