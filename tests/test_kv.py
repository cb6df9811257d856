"""The KV cache in tiers: the numbers of ``DynamicCache``, written once, within the budget."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from offload.errors import BudgetError, OffloadError, SpillError
from offload.tiers.spec import KIB, MIB
from tests.caching import given

if TYPE_CHECKING:
    from offload.run import Runtime
    from tests.conftest import Manager

ROWS, PROMPT, NEW = 4, 12, 40
SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def llama(layers: int = 4) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS, num_hidden_layers=layers))


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SMALL, **HEADS, num_hidden_layers=4))


def mistral() -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SMALL, **HEADS, num_hidden_layers=3, sliding_window=8)
    return MistralForCausalLM(config)


def gemma2() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**SMALL, **HEADS, num_hidden_layers=6, sliding_window=8, head_dim=8)
    return Gemma2ForCausalLM(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 512, "n_embd": 32, "n_layer": 4, "n_head": 4, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, **sizes))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 4, "num_layers": 3}
    ends = {"pad_token_id": 0, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=96, **sizes, **ends))


FAMILIES = {"llama": llama, "qwen2": qwen2, "gpt2": gpt2, "t5": t5, "gemma2": gemma2}
MEMORY_KIB = {"llama": 72, "qwen2": 72, "gpt2": 128, "t5": 120, "gemma2": 72}  # for 4 rows


def build(family: Any = llama, **how: Any) -> Any:
    torch.manual_seed(7)
    model = family(**how).eval()
    for name, p in model.named_parameters():
        if "norm" not in name and "ln_" not in name:
            nn.init.normal_(p, std=0.3)  # as they are made, tiny models say the same all the time
    return model


def generate(model: Any, cache: Any = None, rows: int = ROWS, new: int = NEW, **how: Any) -> Any:
    """Greedy (or as told) from a left-padded batch: tokens and logits."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 96, (rows, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    mask[: rows // 2, :5] = 0
    out = model.generate(
        ids * mask, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **given(model, cache), **how,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def stats(cache: Any) -> dict[str, Any]:
    told: dict[str, Any] = cache.stats()
    return told


def close(run: Runtime, cache: Any) -> None:
    """Close a cache, and see that all it had came back."""
    cache.close()
    assert stats(cache)["held_bytes"] == 0
    assert run.parts.engine.ledger.other_bytes == 0


# -- the same numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_families(manage: Manager, family: str, beams: int) -> None:
    expected = generate(build(FAMILIES[family]), num_beams=beams)
    run = manage(build(FAMILIES[family]), host_bytes=MIB, adversary=beams)
    memory = MEMORY_KIB[family] * KIB * beams
    cache = run.kv_cache(memory=memory, block_tokens=8)
    assert same(generate(run.model, cache, num_beams=beams), expected)
    told = stats(cache)
    assert told["evicted_blocks"] > 10
    assert told["read_bytes"] > 2 * told["written_bytes"] > 0
    assert told["held_bytes"] <= told["limit_bytes"] == memory
    close(run, cache)


def test_four_times_the_host_budget(manage: Manager) -> None:
    layers, rows, budget = 16, 56, 1280 * KIB
    token_bytes = 2 * rows * 2 * 8 * 4 * layers  # keys and values, heads, dim, float32
    expected = generate(build(layers=layers), rows=rows, new=NEW)
    run = manage(build(layers=layers), host_bytes=budget)
    cache = run.kv_cache(block_tokens=4)
    written = run.parts.engine.space.lanes["write"].meter
    assert same(generate(run.model, cache, rows=rows, new=NEW), expected)
    tokens = cache.get_seq_length()
    assert tokens * token_bytes > 4 * budget
    assert stats(cache)["written_bytes"] <= tokens * token_bytes
    # The lane is that of the weights too, and each of those is written once, when it first leaves.
    weight_bytes = sum(p.numel() * p.element_size() for p in run.model.parameters())
    assert written.moved_bytes - stats(cache)["written_bytes"] <= 1.1 * weight_bytes
    assert run.stats()["tiers"]["host"]["peak_bytes"] <= budget
    close(run, cache)


def test_each_token_is_written_once(manage: Manager) -> None:
    run = manage(build(), host_bytes=MIB)
    cache = run.kv_cache(memory=80 * KIB, block_tokens=8)
    written = run.parts.engine.space.lanes["write"].meter
    generate(run.model, cache)
    token_bytes = 2 * ROWS * 2 * 8 * 4 * 4  # keys and values, rows, heads, dim, float32, layers
    for _ in range(8):
        generate_more(run, cache, 5)
        tokens = cache.get_seq_length()
        # What is not in memory was written, and nothing twice: no slot in the file was reused.
        away_bytes = tokens * token_bytes - 80 * KIB
        assert away_bytes <= written.moved_bytes <= tokens * token_bytes
        assert written.moved_bytes <= stats(cache)["disk_bytes"] <= tokens * token_bytes


def test_several_caches_in_turns(manage: Manager) -> None:
    expected = [generate(build(), rows=rows) for rows in (2, 4, 6)]
    run = manage(build(), host_bytes=MIB)
    caches = [run.kv_cache(memory=128 * KIB, block_tokens=8, caches=3) for _ in range(3)]
    for cache, want, rows in zip(caches, expected, (2, 4, 6), strict=True):
        assert same(generate(run.model, cache, rows=rows), want)
    told = stats(caches[0])
    for _ in range(5):  # token by token
        for cache, rows in zip(caches, (2, 4, 6), strict=True):
            with torch.no_grad():
                run.model(torch.ones(rows, 1, dtype=torch.long), **given(run.model, cache))
    now = stats(caches[0])
    assert now["ahead_reads"] - told["ahead_reads"] > 10 * (
        now["demand_reads"] - told["demand_reads"]
    )
    for cache in caches[:2]:
        cache.close()
    close(run, caches[2])


def test_sliding_windows_stay_transformers(manage: Manager) -> None:
    expected = generate(build(mistral))
    run = manage(build(mistral), host_bytes=MIB)
    cache = run.kv_cache(memory=64 * KIB)
    assert same(generate(run.model, cache), expected)
    assert run.parts.engine.ledger.other_bytes > 0, "they are debited"
    close(run, cache)


def test_assisted_decoding_crops(manage: Manager) -> None:
    ids = torch.randint(1, 96, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    how: Any = {"max_new_tokens": 30, "do_sample": False, "prompt_lookup_num_tokens": 3}
    expected = build().generate(ids, **how)
    model = build()
    run = manage(model, host_bytes=MIB)
    cache = run.kv_cache(memory=36 * KIB, block_tokens=8)
    assert torch.equal(model.generate(ids, **given(model, cache), **how), expected)
    assert stats(cache)["written_bytes"] > 0
    close(run, cache)


# -- rows and lengths, against transformers' own cache ----------------------------------------


def states(rows: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return (torch.randn(rows, 2, tokens, 8, generator=generator),
            torch.randn(rows, 2, tokens, 8, generator=generator))  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_operations(manage: Manager, seed: int) -> None:
    from transformers import DynamicCache

    run = manage(build(), host_bytes=MIB, adversary=seed)
    cache, plain = run.kv_cache(block_tokens=4), DynamicCache()
    assert run.parts.kv is not None
    run.parts.kv.room.limit_bytes = 16 * KIB  # gives way to what is needed, and to no more
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    rows = 3
    for _ in range(40):
        what = draw(6)
        if what < 3 or plain.get_seq_length() == 0:
            tokens = 1 + draw(9) * (what == 0)
            for layer in range(4):
                new = states(rows, tokens, generator)
                a, b = cache.update(*new, layer), plain.update(*new, layer)
                assert same(a, b)
        elif what == 3:
            fewer = draw(plain.get_seq_length() + 1)
            both(cache, plain, lambda c, n=fewer: c.crop(-n))
        elif what == 4:
            index = torch.randint(rows, (1 + draw(4),), generator=generator)
            both(cache, plain, lambda c, i=index: c.batch_select_indices(i))
            rows = len(index)
        elif rows <= 3:
            both(cache, plain, lambda c: c.batch_repeat_interleave(2))
            rows *= 2
        for mine, theirs in zip(cache.layers, plain.layers, strict=True):
            assert mine.get_seq_length() == theirs.get_seq_length()
            if theirs.get_seq_length():
                assert torch.equal(mine.keys, theirs.keys)
                assert torch.equal(mine.values, theirs.values)
    assert stats(cache)["evicted_blocks"] > 0
    del mine, a, b  # views of memory that is lent
    close(run, cache)


def both(a: Any, b: Any, do: Any) -> None:
    do(a)
    do(b)


def test_what_is_held_stays_right(manage: Manager) -> None:
    run = manage(build(), host_bytes=MIB)
    cache = run.kv_cache(block_tokens=4)
    generator = torch.Generator().manual_seed(0)
    put = [states(2, 21, generator) for _ in range(4)]
    held = [cache.update(*kv, layer) for layer, kv in enumerate(put)]
    seen = [(layer.keys, layer.values) for layer in cache.layers]
    for kept in (held, seen):
        assert all(
            torch.equal(a, b)
            for kv, got in zip(put, kept, strict=True)
            for a, b in zip(kv, got, strict=True)
        )
    del held, seen, kept
    close(run, cache)


# -- fewer bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("kv_dtype", ["int4", "int2"])
def test_coded_blocks_give_the_same_wherever_they_are(manage: Manager, kv_dtype: str) -> None:
    results = []
    for memory, evicts in ((900 * KIB, False), (150 * KIB, True)):
        run = manage(build(), host_bytes=MIB)
        cache = run.kv_cache(memory=memory, block_tokens=32, kv_dtype=kv_dtype)
        results.append(generate(run.model, cache, new=100))
        told = stats(cache)
        assert (told["read_bytes"] > 0) == evicts
        bound = {"int4": 0.01, "int2": 0.2}[kv_dtype]
        assert bound / 100 < told["key_error"] < bound
        assert bound / 100 < told["value_error"] < bound
        close(run, cache)
        run.close()
    assert same(*results)


def test_coded_blocks_keep_most_tokens_of_a_model(manage: Manager) -> None:
    expected = generate(build())
    run = manage(build(), host_bytes=MIB)
    cache = run.kv_cache(block_tokens=32, kv_dtype="int4")
    tokens, logits = generate(run.model, cache)
    first = PROMPT + 20  # nothing is coded before the 32nd token
    assert torch.equal(tokens[:, :first], expected[0][:, :first])
    assert not torch.equal(logits, expected[1])
    close(run, cache)


# -- refusals and ends ----------------------------------------------------------------------


def test_a_limit_that_is_too_small_says_so(manage: Manager) -> None:
    run = manage(build(), host_bytes=MIB)
    cache = run.kv_cache(memory=40 * KIB, block_tokens=8)
    with pytest.raises(BudgetError, match=r"memory=") as refused:
        generate(run.model, cache)
    assert refused.value.smallest_bytes > 40 * KIB
    del refused  # its traceback has views
    close(run, cache)
    with pytest.raises(OffloadError, match="more than"):
        run.kv_cache(memory=2 * MIB)


def test_without_a_disk_memory_is_the_end(manage: Manager) -> None:
    expected = generate(build())
    run = manage(build(), host_bytes=2 * MIB, disk=False)
    cache = run.kv_cache(block_tokens=8)
    assert same(generate(run.model, cache), expected)
    close(run, cache)
    cache = run.kv_cache(memory=64 * KIB, block_tokens=8)
    with pytest.raises(BudgetError):
        generate(run.model, cache)


def test_weights_and_cache_make_room_for_each_other(manage: Manager) -> None:
    expected = generate(build(), rows=24)
    run = manage(build(), host_bytes=640 * KIB)
    cache = run.kv_cache(memory=540 * KIB, block_tokens=8)
    assert same(generate(run.model, cache, rows=24), expected)
    assert run.parts.engine.counters.evictions > 10
    before = stats(cache)["held_bytes"]
    run.parts.engine.evict_all()
    run.parts.engine.make_room_for(400 * KIB, "a test")
    assert stats(cache)["held_bytes"] < before
    cached = cache.layers[0].keys
    assert cached.shape[2] == PROMPT + NEW - 1
    del cached
    close(run, cache)


def test_corrupt_blocks_are_noticed(manage: Manager) -> None:
    run = manage(build(), host_bytes=MIB)
    cache = run.kv_cache(memory=80 * KIB, block_tokens=8)
    generate(run.model, cache)
    disk = run.parts.kv.file._disk  # type: ignore[union-attr]
    assert disk is not None
    for at in range(0, disk.used_bytes, 4 * KIB):
        os.pwrite(disk.fd, b"x", at + 100)
    with pytest.raises(SpillError, match="not what was written"):
        generate_more(run, cache)
    close(run, cache)


def generate_more(run: Runtime, cache: Any, tokens: int = 2) -> None:
    with torch.no_grad():
        for _ in range(tokens):
            run.model(torch.ones(ROWS, 1, dtype=torch.long), **given(run.model, cache))


def test_refusals(manage: Manager) -> None:
    run = manage(build(), host_bytes=MIB)
    cache = run.kv_cache(block_tokens=8)
    with pytest.raises(OffloadError, match="no_grad"):
        run.model(torch.ones(2, 3, dtype=torch.long), **given(run.model, cache))
    generate(run.model, cache)
    with pytest.raises(OffloadError, match="another batch"), torch.no_grad():
        run.model(torch.ones(1, 1, dtype=torch.long), **given(run.model, cache))
    with pytest.raises(OffloadError, match="int4, int2"):
        run.kv_cache(kv_dtype="int3")
    with pytest.raises(OffloadError, match="open KV caches share"):
        run.kv_cache(memory=64 * KIB)
    run.close()
    with pytest.raises(OffloadError, match="closed together"):
        generate_more(run, cache)
