"""Encoder-decoders in the throughput engine: rows are those of plain transformers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from offload.batchjob import generate
from offload.block import BlockStep
from offload.blockroom import block_cost
from offload.errors import OffloadError
from offload.generateconfig import build_generate
from offload.places import BlockPlan
from offload.progress import QuietProgress
from offload.sampling import Sampling, row_seed
from offload.tiers.spec import KIB
from tests.test_throughput import assert_equal_or_near, prompts, tight_bytes, weights_moved

if TYPE_CHECKING:
    from offload.run import Runtime
    from tests.conftest import Manager

WORDS = 192
NEW = 8


def build(name: str, ends: int = 1, positions: int = 20) -> Any:
    """A seeded tiny model, ready to generate. ``ends``: its end token; ``positions``: of BART."""
    import transformers as t

    kinds: dict[str, Any] = {
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(
            vocab_size=WORDS, d_model=48, d_kv=12, d_ff=96, num_layers=3, num_heads=4,
            pad_token_id=0, eos_token_id=ends, decoder_start_token_id=0,
        )),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(
            vocab_size=WORDS, d_model=48, encoder_layers=2, decoder_layers=3,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_ffn_dim=96, max_position_embeddings=positions, pad_token_id=0, bos_token_id=1,
            eos_token_id=ends, decoder_start_token_id=ends, forced_eos_token_id=None,
        )),
    }  # fmt: skip
    torch.manual_seed(9)
    model = kinds[name]().eval()
    with torch.no_grad():  # livelier than at initialisation: rows differ, and so do their tokens
        for key, p in model.named_parameters():
            if p.dim() > 1 and name == "t5":
                p.mul_(3.0)
            elif p.dim() > 1:
                nn.init.normal_(p, std=0.2 if "shared" in key else 0.5)
    return model


def reference(model: Any, prompt: list[int], **told: Any) -> tuple[list[int], Any]:
    """Plain transformers: the new tokens, and the logits that each was picked from."""
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=NEW, return_dict_in_generate=True,
        output_logits=True, **({"do_sample": False} | told),
    )  # fmt: skip
    return found.sequences[0, 1:].tolist(), found.logits


def tight(manage: Manager, model: Any, plan: BlockPlan) -> Runtime:
    return manage(model, host_bytes=tight_bytes(model, plan, NEW))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_greedy_rows_are_those_of_plain_transformers(manage: Manager, name: str) -> None:
    """More prompts than places: later ones are encoded while others go on; some end early."""
    model = build(name)
    found = Counter(t for prompt in prompts() for t in set(reference(model, prompt)[0][1:]))
    ends = min(found, key=lambda token: found[token])  # of few rows
    plain, model = build(name, ends), build(name, ends)
    wanted = [reference(plain, prompt) for prompt in prompts()]
    plan = BlockPlan(2, 2)
    run = tight(manage, model, plan)
    steps: list[BlockStep] = []
    rows = run.generate(prompts(), NEW, plan=plan, on_step=steps.append)
    equal = [assert_equal_or_near(row, *want) for row, want in zip(rows, wanted, strict=True)]
    assert sum(equal) > len(equal) // 2
    assert {row.reason for row in rows} == {"eos", "length"}
    assert sum(step.prompt_tokens > 0 for step in steps) > 1, "no row took another's place"
    assert weights_moved(run)
    assert run.parts.engine.ledger.other_bytes == 0
    assert run.parts.engine.ledger.peak_bytes <= run.parts.engine.ledger.budget_bytes


@pytest.mark.parametrize("plan", [BlockPlan(1), BlockPlan(2, 2)])
def test_sampled_rows_are_those_drawn_one_by_one(manage: Manager, plan: BlockPlan) -> None:
    model, wanted = build("t5"), []
    for index, prompt in enumerate(prompts()):
        torch.manual_seed(row_seed(7, index))
        wanted.append(
            reference(model, prompt, do_sample=True, temperature=0.8, top_k=20, top_p=0.9)[0]
        )
    run = tight(manage, build("t5"), plan)
    rows = run.generate(prompts(), NEW, sampling=Sampling(0.8, 20, 0.9, seed=7), plan=plan)
    assert [list(row.tokens) for row in rows] == wanted
    assert weights_moved(run)


def test_the_encoder_runs_once_for_each_prompt_and_its_weights_are_loaded_once(
    manage: Manager,
) -> None:
    model = build("t5")
    seen: list[int] = []
    run = tight(manage, model, BlockPlan(2, 3))
    model.encoder.register_forward_hook(lambda _m, _a, out: seen.append(len(out[0])))
    order: list[str] = []
    for name in ("encoder", "decoder"):
        layer = model.get_submodule(f"{name}.block.0")
        layer.register_forward_hook(lambda *_, name=name: order.append(name))
    run.generate(prompts()[:6], 3, plan=BlockPlan(2, 3))
    assert seen == [2, 2, 2]
    assert order == ["encoder"] * 3 + ["decoder"] * 9


def test_keys_and_values_in_tiers(manage: Manager) -> None:
    plan, memory = BlockPlan(2, 2), 300 * KIB
    wanted = manage(build("t5")).generate(prompts(), NEW, plan=plan)
    model = build("t5")
    run = manage(model, host_bytes=tight_bytes(model, plan, NEW) + memory)
    assert run.generate(prompts(), NEW, plan=plan, kv_memory=memory) == wanted
    told = run.stats()["kv"]
    assert told["held_bytes"] == told["disk_bytes"] == 0
    assert weights_moved(run)


def test_what_was_encoded_is_counted(manage: Manager) -> None:
    cost = block_cost(build("bart"))
    assert cost.encoding_bytes == 48 * 4
    assert cost.position_bytes == 2 * 3 * 48 * 4  # three decoder layers, though two encode
    assert cost.of(BlockPlan(1), [10], 5) == 10 * (192 + cost.token_bytes) + 15 * 1152 + 3072


def test_prompts_may_fill_the_encoder_and_not_more(manage: Manager) -> None:
    run = manage(build("bart"))
    plain = build("bart")
    longest = [3 + i for i in range(20)]
    (row,) = run.generate([longest], NEW)
    assert_equal_or_near(row, *reference(plain, longest))
    with pytest.raises(OffloadError, match="the model takes 20"):
        run.generate([[*longest, 3]], NEW)


def test_what_does_not_read_tokens_is_refused(manage: Manager) -> None:
    import transformers as t

    config = t.WhisperConfig(
        vocab_size=WORDS, d_model=16, encoder_layers=1, decoder_layers=1, num_mel_bins=8,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_source_positions=8, max_target_positions=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    run = manage(t.WhisperForConditionalGeneration(config))
    with pytest.raises(OffloadError, match="input_features"):
        run.generate([[3, 4]], 2)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_command_takes_them_too(tmp_path: Path, name: str) -> None:
    from offload.tinymodel import train_tokenizer

    folder, texts = tmp_path / name, ["the quick fox", "a cat", "the lazy dog and the cat"]
    tokenizer = train_tokenizer([])
    model = build(name, ends=5, positions=40)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    asked, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config = build_generate({
        "model": str(folder), "data.prompts": str(asked), "output": str(out),
        "memory.host_memory": "2MiB", "memory.disk": str(tmp_path / "spill"),
        "sampling.max_new_tokens": NEW,
    })  # fmt: skip
    assert generate(config, observer=QuietProgress()).rows == 3
    found = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    plain = type(model).from_pretrained(folder).eval()
    for i, text in enumerate(texts):
        tokens, _ = reference(plain, list(tokenizer(text)["input_ids"]))
        assert found[i]["tokens"] == len(tokens)
        ended = tokens[:-1] if tokens[-1] == 5 else tokens
        assert found[i]["text"] == tokenizer.decode(ended, skip_special_tokens=True)
