"""Saved activations kept, run again or swapped: the same bits, within the budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import offload
import offload.visit
from offload.activations import find_units
from offload.cachename import cache_name
from offload.errors import BudgetError, OffloadError
from offload.steps import Kind
from tests.blocks import ROWS, Stack, start, stats, train

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

FAMILIES = ["gpt2", "llama", "llama-tied", "t5", "vit", "mixtral"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    """What an unwrapped run gives."""
    return train(*start())


@pytest.fixture
def small_swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models: swap tiny tensors too."""
    monkeypatch.setattr(offload.visit, "LEAST_BYTES", 256)


# -- bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("setting", ["recompute", "swap"])
@pytest.mark.usefixtures("small_swaps")
def test_families(zoo: Zoo, manage: Manager, name: str, setting: str) -> None:
    expected = zoo.train(name, *started(zoo, name), steps=4)
    model, optimizer = started(zoo, name)
    run = manage(model, optimizer, activations=setting, adversary=3)
    assert zoo.same(zoo.train(name, model, optimizer, steps=4), expected)
    # Mixtral's layers carry hooks of transformers', which are not to run twice: swapped instead.
    way = "swap" if name == "mixtral" else setting
    assert set(stats(run)["ways"]) == {way}
    assert (stats(run)["swapped_bytes"] > 100_000) == (way == "swap")


def started(zoo: Zoo, name: str, checkpointing: str = "off") -> tuple[nn.Module, Optimizer]:
    model = zoo.build(name, checkpointing)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("setting", ["auto", "recompute", "swap"])
@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
@pytest.mark.usefixtures("small_swaps")
def test_users_own_checkpointing(
    zoo: Zoo, manage: Manager, setting: str, checkpointing: str
) -> None:
    expected = zoo.train("llama", *started(zoo, "llama"), steps=3)
    model, optimizer = started(zoo, "llama", checkpointing)
    run = manage(model, optimizer, activations=setting)
    assert zoo.same(zoo.train("llama", model, optimizer, steps=3), expected)
    assert stats(run)["saved_bytes"] == [0, 0, 0], "those units are the user's"
    assert stats(run)["swapped_bytes"] == 0


@pytest.mark.parametrize("setting", ["auto", "keep", "recompute", "swap"])
@pytest.mark.parametrize("seed", [None, 5])
def test_random_numbers_and_buffers(
    zoo: Zoo, manage: Manager, plain: list[Any], setting: str, seed: int | None
) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, activations=setting, adversary=seed)
    assert zoo.same(train(model, optimizer), plain)
    assert set(stats(run)["ways"]) == ({setting} if setting in ("recompute", "swap") else
                                       {"keep"} if setting == "auto" else set())  # fmt: skip


def test_the_cache_of_transformers_does_not_grow_twice(zoo: Zoo, manage: Manager) -> None:
    model, optimizer = started(zoo, "llama")
    manage(model, optimizer, activations="recompute")
    x = torch.randint(0, 192, (2, 12))
    out: Any = model(input_ids=x, labels=x, use_cache=True)
    out.loss.backward()
    assert getattr(out, cache_name(model.forward)).get_seq_length() == 12


# -- budgets ----------------------------------------------------------------------------------


def peak_bytes(manage: Manager, setting: str) -> int:
    model, optimizer = start()
    run = manage(model, optimizer, activations=setting)
    train(model, optimizer, steps=2)
    return run.parts.engine.ledger.peak_other_bytes


@pytest.mark.parametrize("disk", [True, False])
@pytest.mark.parametrize("share", [0.45, 0.7])
def test_auto_fits_where_keeping_does_not(
    zoo: Zoo, manage: Manager, plain: list[Any], share: float, disk: bool
) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, disk=disk)
    train(model, optimizer, steps=2)
    ledger = run.parts.engine.ledger
    budget = ledger.fixed_bytes + int(share * ledger.peak_other_bytes) + disk * 500_000
    model, optimizer = start()
    manage(model, optimizer, host_bytes=budget, disk=disk)
    with pytest.raises(BudgetError, match=r'give offload\.wrap activations="auto", or use'):
        train(model, optimizer)
    model, optimizer = start()
    run = manage(model, optimizer, host_bytes=budget, disk=disk, activations="auto")
    assert zoo.same(train(model, optimizer), plain)
    ways = stats(run)["ways"]
    assert set(ways) != {"keep"}, ways
    assert run.parts.engine.ledger.peak_bytes <= budget
    assert run.parts.steps.tracks[Kind.TRAIN].trace is not None


def test_less_memory_than_keeping(manage: Manager) -> None:
    assert peak_bytes(manage, "recompute") < 0.5 * peak_bytes(manage, "keep")


def test_swapping_waits_for_room(zoo: Zoo, manage: Manager, plain: list[Any]) -> None:
    model, optimizer = start()
    budget = 3 * peak_bytes(manage, "keep") // 4
    run = manage(model, optimizer, host_bytes=budget, activations="swap", adversary=2)
    assert zoo.same(train(model, optimizer), plain)
    assert run.parts.engine.ledger.peak_bytes <= budget


def test_a_larger_input_than_planned(zoo: Zoo, manage: Manager) -> None:
    expected = [train(m, o, 3) + train(m, o, 3, 2 * ROWS) for m, o in [start()]]
    model, optimizer = start()
    manage(model, optimizer, host_bytes=16 * MIB, activations="auto")
    assert zoo.same([train(model, optimizer, 3) + train(model, optimizer, 3, 2 * ROWS)], expected)


# -- the face ---------------------------------------------------------------------------------


def test_refusals() -> None:
    model, optimizer = start()
    with pytest.raises(OffloadError, match="give one of auto, keep, recompute, swap"):
        offload.wrap(model, optimizer, activations="discard")
    with pytest.raises(OffloadError, match="needs a disk"):
        offload.wrap(model, optimizer, activations="swap")
    with pytest.raises(OffloadError, match="needs a disk"):
        offload.wrap(
            model, optimizer, activations="swap", compute_dtype=torch.bfloat16,
            host_memory="64MiB",
        )  # fmt: skip


def test_kept_by_default(tmp_path: Path) -> None:
    model, optimizer = start()
    offload.wrap(model, optimizer, host_memory="64MiB", disk=tmp_path)
    run = offload.runtime(model)
    train(model, optimizer, steps=2)
    assert run.given.activations == "keep"
    assert stats(run)["ways"] == []
    run.close()


def test_units_are_the_outermost_repeated_blocks(zoo: Zoo) -> None:
    assert list(find_units(Stack(3))) == ["blocks.0", "blocks.1", "blocks.2"]
    t5 = zoo.build("t5")
    assert [n for n in find_units(t5) if n.startswith("enc")] == [
        "encoder.block.0", "encoder.block.1"
    ]  # fmt: skip
    assert find_units(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == {}
