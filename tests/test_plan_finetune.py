"""``offload plan --task finetune``: exact bytes, peaks, answers for people and scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig, T5Config

from offload.blueprint import FineTune, build, draft, outline_of
from offload.forecast import Forecaster
from offload.lora import Adapted
from offload.machines import Processor, Site
from offload.runconfig import TINY_MODEL
from offload.shape import read_config
from offload.tiers.spec import GIB, MIB, Budget
from offload.tinymodel import tiny_config
from tests.conftest import MACHINE
from tests.test_plan import a_model, run
from tests.test_synthesis import CHUNK_BYTES, llama, real_run


def a_llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int = 128256) -> Any:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
    )  # fmt: skip


def a_qwen() -> Any:
    return Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768,
    )  # fmt: skip


FULL, LORA = FineTune(), FineTune(method="lora", rank=8)
HALF = FineTune(dtype="bfloat16")
MODELS: dict[str, tuple[Callable[[], Any], FineTune, int]] = {
    "gpt2": (GPT2Config, FULL, 124_439_808),
    "llama 1B": (lambda: a_llama(2048, 8192, 16, 32), FULL, 1_498_482_688),
    "llama 8B": (lambda: a_llama(4096, 14336, 32, 32), HALF, 8_030_261_248),
    "llama 70B": (lambda: a_llama(8192, 28672, 80, 64), FULL, 70_553_706_496),
    "llama 405B": (lambda: a_llama(16384, 53248, 126, 128), HALF, 405_853_388_800),
    "mixtral 8x7B": (MixtralConfig, FULL, 46_702_792_704),
    "qwen3 30B of experts": (a_qwen, HALF, 30_532_122_624),
    "t5": (T5Config, FULL, 60_506_624),
    "llama 8B, lora": (lambda: a_llama(4096, 14336, 32, 32), LORA, 8_051_232_768),
    "gpt2, lora": (GPT2Config, LORA, 125_619_456),
}


def numels(model: nn.Module) -> tuple[int, int]:
    """Bytes of all and elements of trained parameters, tied ones once."""
    return (
        sum(p.numel() * p.element_size() for p in model.parameters()),
        sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
    )


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_exact_for_models_of_all_sizes(name: str) -> None:
    make, job, parameters = MODELS[name]
    with torch.device("meta"):
        model = build(make(), job)
    assert sum(p.numel() for p in model.parameters()) == parameters
    weights, trained = numels(model)
    found = outline_of(draft(make(), job).model, job, 64 * GIB).by_kind()
    assert found["weights"][0] == weights
    assert found["gradients"][0] == trained
    assert found["optimizer"][0] == 2 * trained  # both moments in the weights' type
    assert all(size <= placed < size * 1.01 + 64 * MIB for size, placed in found.values())


def test_adapters_have_rank_times_in_plus_out() -> None:
    with torch.device("meta"):
        model = build(llama(), FineTune(method="lora", rank=4))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_layer = 2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128)
    assert trained == 3 * 4 * per_layer
    assert not isinstance(model.get_output_embeddings(), Adapted)


TIGHT = {
    "full": (FineTune(batch=2, sequence=16), 3 * MIB // 2),
    "in backward": (FineTune(batch=2, sequence=16, in_backward=True), 3 * MIB // 2),
    "lora": (FineTune(method="lora", rank=4, batch=2, sequence=16), MIB),
    "all stays": (FineTune(batch=8, sequence=32), 64 * MIB),
}


@pytest.mark.parametrize("name", TIGHT)
def test_the_peak_and_the_bytes_moved_are_those_of_a_run(name: str, tmp_path: Path) -> None:
    job, host = TIGHT[name]
    managed = real_run(llama(), job, tmp_path, host)
    stats = managed.stats()
    site = Site("x", MACHINE, Processor(1e10, 1e10, 1e10), host)
    answer = Forecaster(llama()).answer(job, site, Budget(host, None, GIB), CHUNK_BYTES)
    assert answer.fits
    assert answer.spills is (name != "all stays")
    assert answer.tiers["host"].peak_bytes == pytest.approx(
        stats["tiers"]["host"]["peak_bytes"], rel=0.05
    )
    assert answer.pace is not None
    for direction, foretold in (("read", answer.pace.read_bytes),
                                ("write", answer.pace.write_bytes)):  # fmt: skip
        assert foretold == pytest.approx(stats["step_bytes"][direction], rel=0.25, abs=64)
    managed.close()


def test_what_does_not_fit_says_by_how_much_and_the_least_that_works() -> None:
    job = FineTune(batch=2, sequence=16)
    forecaster = Forecaster(llama())
    site = Site("x", MACHINE, Processor(1e10, 1e10, 1e10), MIB)
    little = forecaster.answer(job, site, Budget(MIB // 4, None, GIB), CHUNK_BYTES)
    assert not little.fits
    needed = little.tiers["host"].needed_bytes
    assert little.tiers["host"].spare_bytes == MIB // 4 - needed < 0
    assert forecaster.answer(job, site, Budget(needed, None, GIB), CHUNK_BYTES).fits
    short = forecaster.answer(job, site, Budget(needed - 64, None, GIB), CHUNK_BYTES)
    assert short.tiers["host"].spare_bytes == -64
    assert not short.fits
    no_disk = forecaster.answer(job, site, Budget(needed, None, MIB), CHUNK_BYTES)
    assert not no_disk.fits
    assert no_disk.tiers["disk"].spare_bytes < 0


def test_a_device_takes_activations_from_the_host() -> None:
    job = FineTune(batch=4, sequence=32)
    machine = replace(MACHINE, h2d_bytes_per_s=1e9, d2h_bytes_per_s=1e9)
    site = Site("x", machine, Processor(1e12, 1e12, 1e10), 64 * MIB, 64 * MIB)
    forecaster = Forecaster(llama())
    plain = forecaster.answer(job, site, Budget(64 * MIB, None, GIB))
    there = forecaster.answer(job, site, Budget(64 * MIB, 64 * MIB, GIB))
    assert there.kinds["activations"].device > 0
    assert there.kinds["activations"].host == 0
    assert there.tiers["host"].peak_bytes < plain.tiers["host"].peak_bytes
    assert there.pace is not None
    weights = 2 * there.kinds["weights"].size_bytes - 4 * 128 * 64  # a lookup has no backward use
    assert there.pace.lanes["host to device"] == pytest.approx(weights / 1e9, rel=0.02)
    assert there.pace.lanes["device to host"] == pytest.approx(
        there.kinds["gradients"].size_bytes / 1e9
    )
    little = forecaster.answer(job, site, Budget(64 * MIB, MIB // 2, GIB))
    assert not little.fits
    assert little.tiers["device"].spare_bytes < 0


ASKED = ["plan", "--task", "finetune", "--machine", "rtx4090-64gb-gen4", "--seq-len", "64"]


def test_the_command_is_for_people_and_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*ASKED, "--model", a_model(tmp_path, num_hidden_layers=2), "--host-memory", "16MiB",
             "--device-memory", "16MiB"]  # fmt: skip
    assert run(monkeypatch, *asked, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] is True
    assert said["kinds"]["weights"]["size_bytes"] == 4 * said["parameters"]
    assert said["pace"]["write_bytes"] > 0
    assert said["written_bytes_a_day"] * said["drive_days"] == pytest.approx(1.2e15)
    assert said["advice"][0]["cost"] == "none"
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, *asked, "--no-advice") == 0
    words = capsys.readouterr().out
    assert "it fits" in words
    assert "guaranteed life" in words
    assert f"{said['pace']['tokens_per_s']:.4g} tokens/s" in words


def test_what_does_not_fit_exits_with_3_and_says_what_would_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = a_model(tmp_path, num_hidden_layers=2)
    asked = [*ASKED, "--model", model, "--host-memory", "1MiB", "--batch-size", "2"]
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, *asked) == 3
    words = capsys.readouterr().out
    assert "does NOT fit; lacking" in words
    assert "hardware" in words


REFUSED = [
    (["--method", "qlora"], "full or lora"),
    (["--batch-size", "0"], "data.batch_size must be at least 1"),
    (["--weight-dtype", "int4"], "frozen weights"),
    (["--machine", "rtx1"], "rtx4090-64gb-gen4"),
    (["--task", "sleep"], "finetune and generate"),
    (["--host-memory", "lots"], "not a size"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED, ids=lambda x: str(x)[:30])
def test_odd_questions_are_refused(
    changed: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(monkeypatch, *ASKED, "--model", a_model(tmp_path), *changed) == 2
    assert words in capsys.readouterr().err


def test_models_that_look_at_numbers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    from offload.dryrun import dry_run
    from offload.errors import OffloadError

    def forward(self: Any, input_ids: Any, **_: Any) -> Any:
        return self.lm_head(self.model(input_ids)[0]) if bool(input_ids.sum() > 3) else None

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(OffloadError, match="LlamaForCausalLM cannot be run without data"):
        dry_run(draft(llama(), FineTune(sequence=8)))


def test_the_built_in_model_can_be_asked_about() -> None:
    assert read_config(TINY_MODEL).to_dict() == tiny_config().to_dict()
