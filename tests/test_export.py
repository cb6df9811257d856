"""What is exported loads in plain transformers, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import offload
from offload.config import Tuning
from offload.errors import OffloadError
from offload.tiers.spec import Machine

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def _llama(tied: bool) -> Any:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=128, num_key_value_heads=2, tie_word_embeddings=tied
    )
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = transformers.T5Config(
        vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _mixtral() -> Any:
    config = transformers.MixtralConfig(
        **SMALL, intermediate_size=96, num_key_value_heads=2, num_local_experts=4
    )
    return transformers.MixtralForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _llama(False),
    "llama tied": lambda: _llama(True),
    "llama bfloat16": lambda: _llama(False).to(torch.bfloat16),
    "gpt2": _gpt2,
    "t5": _t5,
    "mixtral": _mixtral,
}


def _managed(model: Any, spill: Path) -> Any:
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    offload.wrap(
        model, host_memory=largest + (96 << 10), disk=spill,
        tuning=Tuning(
            chunk_bytes=32768, machine=Machine(1.8e9, 5.5e9, 1.4e9, 1.4e9, 1e10), poison=True
        ),
    )  # fmt: skip
    return offload.runtime(model)


def _load_report(model_class: Any, path: Path) -> tuple[Any, dict[str, Any]]:
    model, report = model_class.from_pretrained(path, output_loading_info=True, dtype="auto")
    return model, {k: v for k, v in report.items() if v}


@pytest.mark.parametrize("kind", MODELS)
def test_plain_from_pretrained_gives_the_same_weights(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    torch.manual_seed(0)
    plain = MODELS[kind]()
    with _managed(model, tmp_path / "spill") as run:
        run.export(tmp_path / "out")
        assert run.parts.engine.counters.evictions > 0
    loaded, problems = _load_report(type(model), tmp_path / "out")
    assert problems == {}
    assert type(loaded.config) is type(plain.config)
    found, expected = loaded.state_dict(), plain.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name]), name
    plain.save_pretrained(tmp_path / "theirs")
    ours, theirs = tmp_path / "out", tmp_path / "theirs"
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    if kind != "mixtral":  # its experts are written as one tensor, as they are in memory
        assert (
            load_file(ours / "model.safetensors").keys()
            == load_file(theirs / "model.safetensors").keys()
        )
    assert json.loads((ours / "config.json").read_text()) == json.loads(
        (theirs / "config.json").read_text()
    )


def test_shards_have_an_index_and_replace_an_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with _managed(_llama(False), tmp_path / "spill") as run:
        run.export(out)
        (out / "tokenizer.json").touch()
        monkeypatch.setattr("offload.export.SHARD_BYTES", 100_000)
        run.export(out)
        expected = {k: v.clone() for k, v in run.model.state_dict().items()}
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert (out / "tokenizer.json").exists()
    assert not (out / ".export.partial").exists()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * v.numel() for v in expected.values())
    loaded, problems = _load_report(transformers.LlamaForCausalLM, out)
    assert problems == {}
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())


def test_a_plain_module_is_written_too(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    model[1].weight = model[0].weight
    with _managed(model, tmp_path / "spill") as run:
        run.export(tmp_path / "out")
        again = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        again.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
        assert torch.equal(again.state_dict()["1.weight"], model.state_dict()["0.weight"])


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        _managed(_llama(True), tmp_path / "spill") as run,
        pytest.raises(OffloadError, match="could not be written"),
    ):
        run.export(tmp_path / "file")
