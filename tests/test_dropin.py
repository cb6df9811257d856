"""Pipelines, encoders and plain modules within a small budget give what they give without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.data import Record
from offload.run import Runtime
from offload.tiers.spec import KIB
from offload.tinymodel import train_tokenizer
from tests.conftest import Manager

TEXT = "the quick brown fox jumps over the lazy dog and the cat "
PASSES = 4


def tight(manage: Manager, model: nn.Module) -> Runtime:
    """A budget of little more than the hungriest module."""
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    total = sum(p.nbytes for p in model.parameters())
    return manage(model, host_bytes=max(int(0.4 * total), largest + 96 * KIB))


def tokenizer() -> Any:
    """Of a few words, with a mask, padding before a prompt."""
    made = train_tokenizer([Record("here", text=TEXT * 3)])
    made.add_special_tokens({"mask_token": "[MASK]"})
    made.padding_side = "left"
    return made


def bert(kind: str, words: int) -> Any:
    import transformers as t

    torch.manual_seed(4)
    config = t.BertConfig(
        vocab_size=words, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return getattr(t, kind)(config).eval()


def llama(words: int) -> Any:
    import transformers as t

    torch.manual_seed(4)
    return t.LlamaForCausalLM(t.LlamaConfig(
        vocab_size=words, hidden_size=48, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )).eval()  # fmt: skip


Ask = Callable[[Any], Any]
PIPELINES: dict[str, tuple[Callable[[int], Any], Ask]] = {
    "text-generation": (
        llama,
        lambda pipe: pipe(
            ["the quick", "a cat and the lazy dog", "fox"], batch_size=2, max_new_tokens=6,
            do_sample=False,
        ),
    ),
    "fill-mask": (
        lambda words: bert("BertForMaskedLM", words),
        lambda pipe: pipe(["the quick [MASK] fox", "the [MASK] dog and the cat"]),
    ),
    "feature-extraction": (
        lambda words: bert("BertModel", words),
        lambda pipe: pipe(["the quick fox", "dog and the cat"]),
    ),
    "text-classification": (
        lambda words: bert("BertForSequenceClassification", words),
        lambda pipe: pipe(["the quick fox", "dog and the cat"], top_k=None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(manage: Manager, task: str) -> None:
    from transformers import pipeline

    build, ask = PIPELINES[task]
    words = tokenizer()
    plain, model = build(len(words)), build(len(words))
    run = tight(manage, model)
    kind: Any = task
    want = ask(pipeline(kind, model=plain, tokenizer=words))
    pipe = pipeline(kind, model=model, tokenizer=words)
    for _ in range(3):
        assert ask(pipe) == want
    counters = run.parts.engine.counters
    assert counters.evictions > 30
    assert counters.planned_loads > 10


def test_an_encoder_called_as_it_is(manage: Manager) -> None:
    plain, model = bert("BertModel", 192), bert("BertModel", 192)
    run = tight(manage, model)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        for seed in range(PASSES):
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(0, 192, (2, 9), generator=generator)
            told = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
            got, want = model(**told), plain(**told)
            assert torch.equal(got.pooler_output, want.pooler_output)
            for a, b in zip(got.hidden_states, want.hidden_states, strict=True):
                assert torch.equal(a, b)
    assert run.parts.engine.counters.evictions > 10 * PASSES


class Plain(nn.Module):
    """Modules of torch alone: convolution, recurrence, attention, a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.scale = nn.Parameter(torch.randn(64))
        self.convolution = nn.Conv1d(16, 64, 3, padding=1)
        self.recurrence = nn.LSTM(64, 32, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.stack = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # [rows, positions, 16]
        x = self.convolution(x.transpose(1, 2)).transpose(1, 2) * self.scale
        x, _ = self.recurrence(x)
        y, weights = self.attention(x, x, x)
        return {"out": self.stack(y), "weights": weights}


def test_a_plain_module(manage: Manager) -> None:
    plain, model = Plain().eval(), Plain().eval()
    run = tight(manage, model)
    with torch.no_grad():
        for seed in range(PASSES):
            x = torch.randn(2, 5 + seed, 16, generator=torch.Generator().manual_seed(seed))
            got, want = model(x), plain(x)
            assert all(torch.equal(got[name], want[name]) for name in want)
    assert run.parts.engine.counters.evictions > 5 * PASSES
