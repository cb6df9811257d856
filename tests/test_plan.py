"""Shapes without weights, calibration, and ``offload plan``."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from offload import cli
from offload.calibrate import calibrate
from offload.errors import OffloadError
from offload.places import BlockPlan
from offload.planconfig import PlanConfig, build_plan
from offload.prefetch.generation import Rates, Workload
from offload.prefetch.rehearse import rehearse
from offload.prefetch.search import Candidate, Problem, solve
from offload.settings import read_yaml
from offload.shape import model_of, read_config, read_shape
from offload.tiers.spec import MIB, Budget, Compute, Machine
from tests.conftest import CHUNK_BYTES

if TYPE_CHECKING:
    from tests.conftest import Manager

MACHINE = Machine(2e9, 4e9, 1e9, 1e9, 1e10)
HOST = Compute(((1, 2e-10), (8, 3e-10), (64, 1e-9)), 5e9, drag=0.4, disk_drag=0.2)


def a_model(folder: Path, **changes: Any) -> str:
    """A directory with the configuration of a small Llama, and no weights."""
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1024,
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32", **changes,
    }))  # fmt: skip
    return str(folder)


def rates(folder: Path) -> str:
    """Rates as --machine reads them."""
    file = folder / "rates.json"
    file.write_text(json.dumps({"machine": MACHINE.to_dict(), "host": HOST.to_dict()}))
    return str(file)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """``offload ARGUMENTS`` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["offload", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.parametrize("tied", [False, True])
def test_shapes_are_exact(tmp_path: Path, tied: bool) -> None:
    config = read_config(a_model(tmp_path, tie_word_embeddings=tied))
    model = model_of(config, "float32")
    weights = read_shape(config).weights
    assert weights.total_bytes == sum(4 * p.numel() for p in model.parameters())
    assert weights.layer_elements == 256 * (256 * 2 + 128 * 2 + 512 * 3)
    assert weights.lookup_bytes == (0 if tied else 4 * 1024 * 256)
    assert weights.unit_bytes == 4 * 1024 * 256
    assert read_shape(config).rows.position_bytes == 2 * 8 * 128 * 4
    assert read_shape(config, "bfloat16").weights.total_bytes * 2 == weights.total_bytes
    assert read_shape(config).weights == weights, "the configuration is as it was"


def test_packed_weights_are_counted_as_they_are_stored(tmp_path: Path) -> None:
    weights = read_shape(read_config(a_model(tmp_path)), "int4").weights
    assert weights.head_bytes == 1024 * 256 * 9 // 16 + 4 * 256  # 4.5 bits, and the last norm
    assert weights.lookup_bytes == 4 * 1024 * 256


def test_the_command_can_be_read_by_programs_and_people(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["plan", "--task", "generate", "--model", a_model(tmp_path), "--host-memory", "14MiB",
             "--machine", rates(tmp_path), "--prompt-count", "4",
             "--max-new-tokens", "8"]  # fmt: skip
    assert run(monkeypatch, *asked, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["policy"]["weights"]["disk"] > 0
    assert said["policy"]["times"]["bound_s"] <= said["policy"]["times"]["total_s"]
    assert Compute.from_dict(said["rates"]["host"]) == HOST
    assert run(monkeypatch, *asked) == 0
    words = capsys.readouterr().out
    assert "it fits" in words
    assert f"{said['policy']['tokens_per_s']:.2f} tokens/s" in words
    (tmp_path / "again.json").write_text(json.dumps(said))
    assert run(monkeypatch, *asked, "--json", "--machine", str(tmp_path / "again.json")) == 0
    assert json.loads(capsys.readouterr().out) == said


REFUSED = [
    (["--task", "sleep"], "no task"),
    (["--host-memory", "1MiB"], "--host-memory (at least"),
    (["--weight-dtype", "int3"], "give one of"),
    (["--machine", "none.json"], "no rates in"),
    (["--model", "./none"], "no model configuration"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_cannot_be_planned_is_refused(
    changed: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    asked = ["--model", a_model(tmp_path), "--host-memory", "1GiB", "--machine", rates(tmp_path)]
    assert run(monkeypatch, "plan", *asked, *changed) == 2
    assert words in capsys.readouterr().err


def test_experts_that_are_not_stacked_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload.shape._EXPERTS", ("num_attention_heads",))  # no tensor has so many
    with pytest.raises(OffloadError, match="not stacked"):
        read_shape(a_mixtral(2))


@pytest.mark.parametrize("weight_dtype", [None, "int4"])
def test_layers_are_measured(
    tmp_path: Path, weight_dtype: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(work: Callable[[], object], folder: Path) -> Any:
        assert folder == tmp_path
        work()
        return 0.3, 0.1

    monkeypatch.setattr("offload.calibrate.contention", probe)
    found = calibrate(read_config(a_model(tmp_path)), weight_dtype, tmp_path, MACHINE)
    assert (found.drag, found.disk_drag) == (0.3, 0.1)
    assert [t for t, _ in found.product_s] == [1, 2, 8, 32, 128, 512]
    assert all(s > 0 for _, s in found.product_s)
    assert found.attend_bytes_per_s > 0


def a_mixtral(layers: int = 6) -> Any:
    """The configuration of a small Mixtral, most of which is experts."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=192, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def test_experts_by_hand() -> None:
    config = a_mixtral()
    model, weights = model_of(config, "float32"), read_shape(config).weights
    assert weights.total_bytes == sum(4 * p.numel() for p in model.parameters())
    experts = weights.experts
    assert (experts.count, experts.chosen) == (8, 2)
    assert experts.layer_elements == 8 * 3 * 64 * 128
    assert experts.layer_bytes == weights.unit_bytes == 4 * experts.layer_elements
    assert experts.touched(1) == 0.25
    assert experts.touched(3) == pytest.approx(1 - 0.75**3)
    reading = weights.routed(Compute(((1, 1e-9), (512, 1e-9)), 1.0))  # however many tokens
    multiplying = weights.routed(Compute(((1, 1e-9), (64, 64e-9), (512, 512e-9)), 1.0))
    always = weights.layer_elements - experts.layer_elements
    for rows in (1, 64, 512):
        touched = always + experts.layer_elements * experts.touched(rows)
        assert weights.layer_s(rows, reading) == pytest.approx(touched * 1e-9)
        routed = always + experts.layer_elements / 4
        assert weights.layer_s(rows, multiplying) == pytest.approx(rows * routed * 1e-9)


@pytest.mark.parametrize(("rows", "host_mib"), [(1, 3.0), (6, 3.0), (1, 4.0)])
def test_bytes_of_a_streamed_mixtral_are_those_that_were_planned(
    manage: Manager, rows: int, host_mib: float
) -> None:
    """A later step's, within a tenth: all experts are read, whichever are chosen."""
    torch.manual_seed(0)
    model = model_of(a_mixtral(), "float32").eval()
    run = manage(model, host_bytes=int(host_mib * MIB))
    meter, read = run.parts.engine.space.lanes["read"].meter, list[int]()

    def note(_: object) -> None:
        read.append(meter.moved_bytes)

    run.generate([[3, 4, 5]] * rows, 16, plan=BlockPlan(rows), on_step=note)
    measured_bytes = statistics.median(b - a for a, b in itertools.pairwise(read[4:]))
    problem = Problem(
        read_shape(model.config), Rates(MACHINE, HOST),
        Budget(run.parts.engine.ledger.capacity_bytes), Workload(rows, 3, 16),
        chunk_bytes=CHUNK_BYTES,
    )  # fmt: skip
    found = solve(problem, Candidate(rows, 1))
    assert found is not None
    policy = rehearse(problem, found)
    planned_bytes = policy.weights.disk * problem.shape.weights.pass_bytes
    assert planned_bytes == pytest.approx(measured_bytes, rel=0.1)
    assert planned_bytes > 0.2 * problem.shape.weights.experts.layer_bytes * 6


def test_the_command_says_what_it_assumes_of_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_mixtral().save_pretrained(tmp_path)
    asked = ["plan", "--task", "generate", "--model", str(tmp_path), "--host-memory", "30MiB",
             "--machine", rates(tmp_path), "--prompt-count", "2"]  # fmt: skip
    assert run(monkeypatch, *asked, "--json") == 0
    said = json.loads(capsys.readouterr().out)["experts"]
    assert said["touched_share"] == 1 - 0.75**2
    assert said["touched_bytes_per_token"] < said["pass_bytes_per_token"]
    assert run(monkeypatch, *asked) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "1 - (1 - 2/8)^2 = 44%" in words
    assert "balanced" in words


FOREIGN = {"output": "runs/x", "schedule": {"steps": 7}, "data": {"path": "d.txt", "seq_len": 32,
           "accumulate": 3}, "memory": {"host_memory": "1MiB"}}  # fmt: skip


def test_a_run_s_own_file_is_what_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What flags say, else the file, else the defaults; the file of finetune means finetune."""
    file = tmp_path / "config.yaml"
    told = FOREIGN | {"model": a_model(tmp_path, num_hidden_layers=2), "compute": {"bf16": True}}
    file.write_text(yaml.safe_dump(told))
    asked = ["plan", "--config", str(file), "--machine", "rtx4090-64gb-gen4", "--no-advice"]
    assert run(monkeypatch, *asked, "--batch-size", "2", "--host-memory", "16MiB", "--json") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["task"] == "finetune"
    job, budget = found["job"], found["budget"]
    assert (job["batch"], job["sequence"], job["rank"]) == (6, 32, 16)
    assert budget["host_bytes"] == 16 << 20
    assert "compute.bf16 is not modelled" in said.err
    assert run(monkeypatch, *asked, "--json") == 3  # of the file's own MiB


def test_plans_of_rows_take_the_file_of_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.yaml"
    told = {"model": a_model(tmp_path), "output": "o", "data": {"prompts": "p", "batch_size": 8},
            "compute": {"dtype": "bfloat16"}, "sampling": {"max_new_tokens": 5, "stop": ["x"]},
            "memory": {"host_memory": "14MiB"}, "rows": {"prompt_count": 4}}  # fmt: skip
    file.write_text(yaml.safe_dump(told))
    asked = ["plan", "--config", str(file), "--machine", rates(tmp_path), "--json"]
    assert run(monkeypatch, *asked) == 0
    said = json.loads(capsys.readouterr().out)
    work = said["work"]
    assert (work["prompts"], work["prompt_tokens"], work["new_tokens"]) == (4, 64, 5)
    shape = read_shape(read_config(str(told["model"])), "bfloat16")
    assert said["shape"] == json.loads(json.dumps(asdict(shape)))
    file.write_text(yaml.safe_dump(told | {"rows": {"promt_count": 4}}))
    assert run(monkeypatch, *asked) == 2
    assert "did you mean 'rows.prompt_count'" in capsys.readouterr().err


def test_a_dry_plan_measures_and_forecasts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("offload.plan_finetune.forecast", "offload.plan_cli.measured"):
        monkeypatch.setattr(name, lambda *a, **k: pytest.fail("done"))
    asked = ["plan", "--model", a_model(tmp_path), "--dry-run", "--host-memory", "1GiB"]
    assert run(monkeypatch, *asked, "--task", "finetune", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["event"], said["measures"]) == ("dry-run", True)
    assert said["config"]["memory"]["host_memory"] == "1GiB"
    assert run(monkeypatch, *asked, "--machine", "rtx4090-64gb-gen4") == 0
    words = capsys.readouterr().out
    assert "nothing is measured" in words
    settings = yaml.safe_load(words.split("would forecast")[0])
    assert build_plan(dict(read_yaml_text(tmp_path, settings)))[0].task == "generate"
    for odd, why in (("--weight-dtype", "give one of"), ("--machine", "rtx4090-64gb-gen4"),
                     ("--task", "finetune and generate"), ("--model", "no model")):  # fmt: skip
        assert run(monkeypatch, *asked, odd, "./none") == 2
        assert why in capsys.readouterr().err
    assert run(monkeypatch, *asked, "--task", "finetune", "--method", "qlora") == 2


def read_yaml_text(folder: Path, settings: Any) -> dict[str, Any]:
    """Printed settings are a ``--config`` file."""
    file = folder / "again.yaml"
    file.write_text(yaml.safe_dump(settings))
    return read_yaml(file, PlanConfig)
