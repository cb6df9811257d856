"""Many rows whose keys and values live in tiers: the tokens of plain caches, written once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from offload.block import BlockStep
from offload.errors import BudgetError, OffloadError
from offload.places import BlockPlan
from offload.sampling import Sampling
from offload.tiers.spec import KIB, MIB

if TYPE_CHECKING:
    from offload.run import Runtime
    from tests.conftest import Manager

WORDS = 96


def build(name: str = "llama", layers: int = 4, ends: tuple[int, ...] = ()) -> Any:
    """A seeded model with small weights for its keys and values; rows end at ``ends``."""
    import transformers as t

    sizes = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": list(ends) or None,
    }  # fmt: skip
    config: Any = {
        "llama": t.LlamaConfig,
        "gemma2": lambda **s: t.Gemma2Config(**s, sliding_window=8),
        "mistral": lambda **s: t.MistralConfig(**s, sliding_window=8),
    }[name](**sizes)
    torch.manual_seed(7)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    for key, p in model.named_parameters():
        if "norm" not in key:
            nn.init.normal_(p, std=0.3)
    return model


def prompts(count: int, shortest: int = 6, longest: int = 14) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    sizes = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [torch.randint(3, WORDS, (int(n),), generator=generator).tolist() for n in sizes]


def end(run: Runtime) -> dict[str, Any]:
    """What the caches did; all they had came back."""
    told: dict[str, Any] = run.stats()["kv"]
    assert told["held_bytes"] == told["disk_bytes"] == 0
    assert run.parts.engine.ledger.other_bytes == 0
    assert run.parts.kv is not None
    assert run.parts.kv.histories == []
    return told


@pytest.mark.parametrize(
    ("name", "plan", "memory"),
    [
        ("llama", BlockPlan(4), 220 * KIB),
        ("llama", BlockPlan(2, 3), 330 * KIB),
        ("gemma2", BlockPlan(2, 3), 240 * KIB),  # every other layer has a sliding window
    ],
)
def test_rows_that_end_and_begin_are_those_of_plain_caches(
    manage: Manager, name: str, plan: BlockPlan, memory: int
) -> None:
    ends, asked = tuple(range(3, 9)), prompts(9)
    how: Any = {"plan": plan, "sampling": Sampling(temperature=2.0, seed=1)}
    wanted = manage(build(name, ends=ends)).generate(asked, 30, **how)  # transformers' caches
    run = manage(build(name, ends=ends), host_bytes=MIB, adversary=3)
    steps: list[BlockStep] = []
    rows = run.generate(asked, 30, kv_memory=memory, on_step=steps.append, **how)
    assert rows == wanted
    assert {row.reason for row in rows} == {"eos", "length"}
    assert sum(step.prompt_tokens > 0 for step in steps) > 1, "no row took another's place"
    told = end(run)
    assert told["evicted_blocks"] > 10
    assert told["read_bytes"] > told["written_bytes"] > 0
    assert run.parts.engine.ledger.peak_bytes <= MIB


def test_a_block_of_four_times_the_host_budget(manage: Manager) -> None:
    layers, plan, new, budget = 12, BlockPlan(12, 2), 60, 2304 * KIB
    memory = 1408 * KIB
    asked = prompts(plan.rows, 12, 12)
    token_bytes = plan.rows * 2 * 4 * 16 * 4 * layers  # rows, keys and values, heads, dim, float32
    wanted = manage(build(layers=layers)).generate(asked, new, plan=plan)
    run = manage(build(layers=layers), host_bytes=budget)
    run.parts.engine.evict_all()  # weights are written now, and not again
    written = run.parts.engine.space.lanes["write"].meter
    before, held = written.moved_bytes, list[int]()
    rows = run.generate(
        asked, new, plan=plan, kv_memory=memory,
        on_step=lambda _: held.append(run.stats()["kv"]["held_bytes"]),
    )  # fmt: skip
    assert rows == wanted
    tokens = 12 + new - 1
    assert tokens * token_bytes > 4 * budget
    assert max(held) <= memory
    assert run.parts.engine.ledger.peak_bytes <= budget
    told = end(run)
    # What is not in memory was written, and nothing twice.
    moved = written.moved_bytes - before
    assert tokens * token_bytes - memory <= moved == told["written_bytes"]
    assert moved <= tokens * token_bytes


def test_fewer_bits_in_the_memory_that_is_left(manage: Manager) -> None:
    asked = prompts(4, 40, 48)
    wanted = manage(build()).generate(asked, 4, plan=BlockPlan(2, 2))
    run = manage(build(), host_bytes=2 * MIB)
    rows = run.generate(asked, 4, plan=BlockPlan(2, 2), kv_dtype="int4")
    assert [row.tokens[0] for row in rows] == [row.tokens[0] for row in wanted], "coded after it"
    assert run.parts.kv is not None
    assert 0 < run.parts.kv.room.limit_bytes < MIB
    end(run)


def test_without_a_plan_as_many_rows_as_the_memory_serves(manage: Manager) -> None:
    most = {}
    for memory in (256 * KIB, 640 * KIB):
        run = manage(build(), host_bytes=4 * MIB)
        steps: list[BlockStep] = []
        assert len(run.generate(prompts(24), 4, kv_memory=memory, on_step=steps.append)) == 24
        most[memory] = max(step.new_tokens for step in steps)
        end(run)
    assert 1 < most[256 * KIB] < most[640 * KIB]


def test_what_cannot_be_is_refused_and_nothing_stays_taken(manage: Manager) -> None:
    run = manage(build(), host_bytes=MIB)
    with pytest.raises(BudgetError, match="kv_memory"):
        run.generate(prompts(6), 30, plan=BlockPlan(2, 3), kv_memory=100 * KIB)
    with pytest.raises(OffloadError, match="give less kv_memory"):
        run.generate(prompts(6), 4, kv_memory=2 * MIB)
    with pytest.raises(ValueError, match="int4, int2"):
        run.generate(prompts(6), 4, kv_dtype="int3")
    with pytest.raises(OffloadError, match="sliding windows in all layers"):
        manage(build("mistral")).generate(prompts(2), 4, kv_memory=MIB)
    assert len(run.generate(prompts(6), 4, kv_memory=400 * KIB)) == 6
    end(run)
