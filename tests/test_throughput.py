"""Generation for throughput: rows are those of plain transformers, whatever goes beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from offload.block import BlockStep, Row
from offload.blockroom import block_cost
from offload.places import BlockPlan
from offload.run import Runtime

if TYPE_CHECKING:
    from tests.conftest import Manager

WORDS = 192
NEAR = 1e-4  # of two logits: beyond this rounding does not change which one is greater
PROMPTS = 7


def _sizes(config: type, **more: Any) -> Any:
    return config(
        vocab_size=WORDS, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **more,
    )  # fmt: skip


def build(name: str) -> Any:
    """A seeded tiny model, ready to generate."""
    import transformers as t

    configs: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=WORDS, n_embd=48, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        ),
        "opt": lambda: t.OPTConfig(
            vocab_size=WORDS, hidden_size=48, word_embed_proj_dim=48, ffn_dim=96,
            num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        "llama": lambda: _sizes(t.LlamaConfig),
        "qwen2": lambda: _sizes(t.Qwen2Config),
        "gemma": lambda: _sizes(t.GemmaConfig, head_dim=12),
        "gemma2": lambda: _sizes(t.Gemma2Config, head_dim=12, sliding_window=8),
        "mixtral": lambda: _sizes(t.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
        "bloom": lambda: t.BloomConfig(
            vocab_size=WORDS, hidden_size=48, n_layer=3, n_head=4, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
    }  # fmt: skip
    torch.manual_seed(5)
    model = t.AutoModelForCausalLM.from_config(configs[name]())
    with torch.no_grad():  # livelier than at initialisation: rows differ, and some end early
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(6.0)
    return model.eval()


def prompts(count: int = PROMPTS) -> list[list[int]]:
    """Of different lengths, from 3 to 17 tokens."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(3, 18, (count,), generator=generator)
    return [torch.randint(3, WORDS, (int(n),), generator=generator).tolist() for n in sizes]


def reference(model: Any, prompt: list[int], count: int, **told: Any) -> tuple[list[int], Any]:
    """Plain transformers: the new tokens, and the logits that each was picked from."""
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, return_dict_in_generate=True,
        output_logits=True, **({"do_sample": False} | told),
    )  # fmt: skip
    return found.sequences[0, len(prompt) :].tolist(), found.logits


def assert_equal_or_near(row: Row, wanted: list[int], logits: Any) -> bool:
    """The same tokens up to a place where the two best logits are too close; whether all are."""
    for at, (a, b) in enumerate(zip(row.tokens, wanted, strict=False)):
        if a != b:
            best = logits[at][0].topk(2).values
            assert float(best[0] - best[1]) < NEAR, f"row {row.index} differs at token {at}"
            return False
    assert len(row.tokens) == len(wanted), f"row {row.index} ends otherwise"
    return True


def tight_bytes(model: Any, plan: BlockPlan, new_tokens: int) -> int:
    """A budget that holds the block and half of the weights."""
    weights: int = sum(p.numel() * p.element_size() for p in set(model.parameters()))
    sizes = [len(prompt) for prompt in prompts()]
    return block_cost(model).of(plan, sizes, new_tokens) + weights // 2


def weights_moved(run: Runtime) -> bool:
    return run.parts.engine.counters.evictions > 10


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("offload-micro-batch")]


MODELS = ["gpt2", "opt", "llama", "qwen2", "gemma", "gemma2", "mixtral", "bloom"]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_rows_are_those_of_plain_transformers(manage: Manager, name: str) -> None:
    plain, model = build(name), build(name)
    wanted = [reference(plain, prompt, 8) for prompt in prompts()]
    plan = BlockPlan(2, 3)
    run = manage(model, host_bytes=tight_bytes(model, plan, 8))
    steps: list[BlockStep] = []
    rows = run.generate(prompts(), 8, plan=plan, on_step=steps.append)
    assert [row.index for row in rows] == list(range(PROMPTS))
    equal = [assert_equal_or_near(row, *want) for row, want in zip(rows, wanted, strict=True)]
    assert sum(equal) > PROMPTS // 2
    assert weights_moved(run)
    assert max(step.micro_batches for step in steps) > 1
    assert run.parts.engine.ledger.other_bytes == 0
