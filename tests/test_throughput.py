"""Generation for throughput: rows are those of plain transformers, whatever goes beside them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from offload.block import BlockStep, Row
from offload.blockroom import block_cost
from offload.errors import BudgetError, OffloadError
from offload.places import BlockPlan
from offload.run import Runtime
from offload.sampling import Sampling, row_seed
from offload.steps import GROWTH, Kind
from offload.tiers.spec import KIB
from tests.conftest import adamw, copied, same
from tests.framed import Watched

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


def tight(manage: Manager, model: Any, plan: BlockPlan, new_tokens: int = 8) -> Runtime:
    return manage(model, host_bytes=tight_bytes(model, plan, new_tokens))


@pytest.fixture(scope="module")
def drawn() -> list[Row]:
    """Rows drawn one by one, in memory."""
    model, found = build("llama"), []
    for index, prompt in enumerate(prompts()):
        torch.manual_seed(row_seed(7, index))
        tokens, _ = reference(
            model, prompt, 8, do_sample=True, temperature=0.8, top_k=20, top_p=0.9
        )
        found.append(Row(index, tuple(tokens), "eos" if tokens[-1] == 2 else "length"))
    return found


@pytest.mark.parametrize("plan", [BlockPlan(1), BlockPlan(3), BlockPlan(2, 2)])
def test_what_is_drawn_does_not_depend_on_which_rows_go_together(
    manage: Manager, drawn: list[Row], plan: BlockPlan
) -> None:
    run = tight(manage, build("llama"), plan)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=7)
    assert run.generate(prompts(), 8, sampling=sampling, plan=plan) == drawn
    assert weights_moved(run)
    other = run.generate(prompts(), 8, sampling=Sampling(0.8, 20, 0.9, seed=8), plan=plan)
    assert other != drawn


def test_weights_are_loaded_once_for_all_micro_batches(manage: Manager) -> None:
    moved = {}
    for plan in (BlockPlan(1), BlockPlan(1, 6)):
        model = build("llama")
        run = manage(model, host_bytes=tight_bytes(model, BlockPlan(1, 6), 8))
        run.parts.engine.take_other(
            block_cost(model).of(BlockPlan(1, 6), list(map(len, prompts())), 8)
            - block_cost(model).of(plan, list(map(len, prompts())), 8), "the same room for both"
        )  # fmt: skip
        lane, steps = run.parts.engine.space.lanes["read"].meter, list[BlockStep]()
        before = lane.moved_bytes
        run.generate(prompts()[:6], 8, plan=plan, on_step=steps.append)
        moved[plan] = (lane.moved_bytes - before) / len(steps)
        assert moved[plan] > 0
    assert moved[BlockPlan(1, 6)] < 1.2 * moved[BlockPlan(1)]


def test_only_the_first_pass_is_on_demand_and_plans_count_the_block_once(manage: Manager) -> None:
    model = build("llama")
    run = tight(manage, model, BlockPlan(PROMPTS))
    engine, other_bytes, demanded = run.parts.engine, set[int](), list[int]()

    def note(step: BlockStep) -> None:
        trace = run.parts.steps.tracks[Kind.INFER].trace
        assert trace is not None
        other_bytes.update(m.other_bytes for m in trace.moments)
        assert engine.ledger.other_bytes <= min(other_bytes)
        assert max(other_bytes) < GROWTH * engine.ledger.other_bytes
        demanded.append(engine.counters.demand_loads)

    run.generate(prompts(), 4, plan=BlockPlan(PROMPTS), on_step=note)
    assert demanded[0] > 10
    assert demanded[1] - demanded[0] < demanded[0] / 4
    assert engine.counters.planned_loads > 10


def test_rows_that_end_early_make_room_for_others(manage: Manager) -> None:
    plain, model = build("llama"), build("llama")
    ends = reference(plain, prompts()[0], 3)[0][-1]
    for each in (plain, model):
        each.generation_config.eos_token_id = [2, ends]
    wanted = [reference(plain, prompt, 8) for prompt in prompts()]
    run = tight(manage, model, BlockPlan(2))
    steps: list[BlockStep] = []
    rows = run.generate(prompts(), 8, plan=BlockPlan(2), on_step=steps.append)
    for row, want in zip(rows, wanted, strict=True):
        assert_equal_or_near(row, *want)
    assert rows[0].reason == "eos"
    assert rows[0].tokens[-1] == ends
    assert sum(step.prompt_tokens > 0 for step in steps[1:]) >= 3
    assert max(step.new_tokens for step in steps) == 2


def test_without_a_plan_the_rows_fill_the_budget_and_stay_within_it(manage: Manager) -> None:
    model = build("llama")
    run = manage(model, host_bytes=tight_bytes(model, BlockPlan(1), 8))
    steps: list[BlockStep] = []
    rows = run.generate(prompts(), 8, on_step=steps.append)
    assert len(rows) == PROMPTS
    assert 1 < max(step.new_tokens for step in steps) < PROMPTS
    assert run.parts.engine.ledger.peak_bytes <= run.parts.engine.ledger.budget_bytes


def test_a_block_that_does_not_fit_is_refused_and_nothing_stays_taken(manage: Manager) -> None:
    model = build("llama")
    run = manage(model, host_bytes=tight_bytes(model, BlockPlan(1), 8))
    with pytest.raises(BudgetError, match="block of rows"):
        run.generate(prompts(), 8, plan=BlockPlan(PROMPTS))
    assert run.parts.engine.ledger.other_bytes == 0
    assert len(run.generate(prompts(), 8, plan=BlockPlan(1))) == PROMPTS


class BrokenError(RuntimeError):
    pass


def test_an_error_in_one_pass_ends_all_and_leaves_the_run_usable(manage: Manager) -> None:
    model = build("llama").train()
    run = tight(manage, model, BlockPlan(2, 2))
    before = run.generate(prompts(), 8, plan=BlockPlan(2, 2))

    def fail(*_: object) -> None:
        raise BrokenError

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(BrokenError):
        run.generate(prompts(), 8, plan=BlockPlan(2, 2))
    handle.remove()
    assert run.parts.engine.ledger.other_bytes == 0
    assert model.training, "it is as it was"
    assert run.generate(prompts(), 8, plan=BlockPlan(2, 2)) == before


def test_generation_within_training_leaves_its_bits_alone(manage: Manager) -> None:
    def train(run: Runtime | None, model: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
        losses = []
        for step in range(3):
            x = torch.tensor(prompts()[step])[None]
            loss = model(input_ids=x, labels=x).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if run is not None:
                run.generate(prompts()[:3], 4, plan=BlockPlan(1, 3))
            losses.append(loss.item())
        return [losses, copied(model.state_dict())]

    plain, model = build("llama").train(), build("llama").train()
    wanted = train(None, plain, adamw(list(plain.parameters())))
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=700 * KIB)
    assert same(wanted, train(run, model, optimizer))
    assert weights_moved(run)


def test_everything_in_memory_works_as_well(manage: Manager) -> None:
    rows = manage(build("llama"), disk=False).generate(prompts(), 4, plan=BlockPlan(2, 2))
    plain = build("llama")
    for row, prompt in zip(rows, prompts(), strict=True):
        assert_equal_or_near(row, *reference(plain, prompt, 4))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[3, 4], []], "prompt 1 is empty"),
        ([[3] * 64], "the model takes 63"),
        ([[3, WORDS]], "tokens from 3 to 192"),
        (["text"], "tokenizer="),
    ],
)
def test_prompts_that_cannot_work_are_refused(
    manage: Manager, bad: list[Any], message: str
) -> None:
    run = manage(build("llama"))
    with pytest.raises(OffloadError, match=message):
        run.generate(bad, 4)


def test_settings_that_are_ignored_are_named(
    manage: Manager, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("llama")
    model.generation_config.repetition_penalty = 1.3
    manage(model).generate([[3]], 2)
    assert "repetition_penalty=1.3" in capsys.readouterr().err


def test_in_frames_one_micro_batch_goes_after_the_other(tmp_path: Path) -> None:
    plain, model = build("llama"), build("llama")
    watched = Watched(model, tmp_path, memory="300KiB", host="600KiB")
    rows = watched.runtime.generate(prompts()[:4], 4, plan=BlockPlan(2, 2))
    for row, prompt in zip(rows, prompts(), strict=False):
        assert_equal_or_near(row, *reference(plain, prompt, 4))
    assert max(map(len, watched.places.values())) > 4, "all of it fitted: nothing is proved"
    assert watched.doubles == 0
    watched.runtime.close()
