"""How many rows at once, where they are computed in device memory and the host has more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.blockcaches import KVAsked, caches_for
from offload.blockroom import block_cost
from offload.errors import BudgetError
from offload.places import BlockPlan
from offload.tiers.spec import KIB
from tests.framed import Watched
from tests.test_throughput import assert_equal_or_near, build, prompts, reference

ROWS, TOKENS = 24, 8
Wrap = Callable[..., Watched]


@pytest.fixture
def wrap(tmp_path: Path) -> Wrap:
    """A model whose rows do not all fit on its device, and would on the host."""
    made: list[Watched] = []

    def wrapped(device_kib: int) -> Watched:
        made.append(Watched(build("llama"), tmp_path, memory=f"{device_kib}KiB", host="16MiB"))
        return made[-1]

    return wrapped


def check(watched: Watched, rows: list[Any]) -> None:
    """The tokens of plain transformers, within both budgets."""
    plain = build("llama")
    for row, prompt in zip(rows, prompts(ROWS), strict=True):
        assert_equal_or_near(row, *reference(plain, prompt, TOKENS))
    for engine in (watched.runtime.parts.engine, watched.device.engine):
        assert engine.ledger.peak_bytes <= engine.ledger.budget_bytes
        assert engine.ledger.other_bytes == 0
    watched.close()


def block_kib(plan: BlockPlan) -> int:
    lengths = [len(prompt) for prompt in prompts(ROWS)]
    return block_cost(build("llama")).of(plan, lengths, TOKENS) // KIB


def test_as_many_as_the_device_holds(wrap: Wrap) -> None:
    watched = wrap(block_kib(BlockPlan(8)))
    rows = watched.runtime.generate(prompts(ROWS), TOKENS)
    chosen = watched.runtime.stats()["generate"]
    assert chosen["chosen_by"] == "room"
    assert 1 < chosen["batch"] * chosen["micro_batches"] < ROWS
    check(watched, rows)


def test_keys_and_values_on_the_host_leave_the_device_to_rows(wrap: Wrap) -> None:
    """A layer's of the rows that have their turn are there, and are counted."""
    device_kib = block_kib(BlockPlan(4))
    held, tiered = wrap(device_kib), wrap(device_kib)
    held.runtime.generate(prompts(ROWS), TOKENS)
    rows = tiered.runtime.generate(prompts(ROWS), TOKENS, kv_memory="4MiB")
    more, few = (w.runtime.stats()["generate"] for w in (tiered, held))
    counts = [w["batch"] * w["micro_batches"] for w in (few, more)]
    assert counts[0] < counts[1]
    asked = KVAsked(memory=4 << 20)
    parts, given = tiered.runtime.parts, tiered.runtime.given
    cost = caches_for(tiered.model, parts, given, asked).cost
    assert cost.kv is not None
    assert cost.kv.crossing_bytes == 2 * cost.kv.layer_bytes
    assert cost.kv.memory_bytes == 4 << 20
    coded = caches_for(tiered.model, parts, given, KVAsked(kv_dtype="int4")).cost
    assert coded.kv is not None
    assert coded.kv.memory_bytes > parts.computing.ledger.capacity_bytes, "half of the host's room"
    assert cost.kv_bytes(BlockPlan(2, 3), [5, 7, 1], 4) == (5 + 7 + 8) * cost.kv.crossing_bytes
    held.close()
    check(tiered, rows)


def test_a_block_beyond_the_device_is_refused_and_told_what_fits(wrap: Wrap) -> None:
    watched = wrap(block_kib(BlockPlan(6)))
    with pytest.raises(BudgetError, match="device tier: the block of rows") as refused:
        watched.runtime.generate(prompts(ROWS), TOKENS, plan=BlockPlan(12, 2))
    assert "a smaller batch (BlockPlan(" in str(refused.value)
    assert "device_memory of at least" in str(refused.value)
    assert refused.value.tier == "device"
    with pytest.raises(BudgetError, match="device tier: the block of rows") as tiered:
        watched.runtime.generate(prompts(ROWS), TOKENS, plan=BlockPlan(24, 1), kv_memory="4MiB")
    assert "kv_memory" not in str(tiered.value), "that is the host's"
    watched.close()
    enough = wrap(refused.value.smallest_bytes // KIB + 96)
    rows = enough.runtime.generate(prompts(ROWS), TOKENS, plan=BlockPlan(12, 2))
    check(enough, rows)
