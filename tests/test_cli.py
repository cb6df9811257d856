"""The frame of the command line: YAML and flags, dry runs, what is said, completion."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import offload
from offload import cli
from offload.config import Tuning
from offload.finetune import make_optimizer
from offload.runconfig import RunConfig, build_config
from offload.settings import to_yaml
from tests.conftest import MACHINE
from tests.tiny import tiny_run, write_tiny_model

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command in this process; its exit status."""

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["offload", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path) -> RunConfig:
    return tiny_run(model, tmp_path)


@pytest.fixture
def rows(model: Path, tmp_path: Path) -> dict[str, Any]:
    """The settings of a generation, as YAML would hold them."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n')
    return {
        "model": str(model), "output": str(tmp_path / "rows.jsonl"),
        "data": {"prompts": str(prompts), "with_prompt": True},
        "sampling": {"max_new_tokens": 3, "temperature": 0.5, "stop": ["zz"]},
        "memory": {"host_memory": "64MiB"},
    }  # fmt: skip


def tree(folder: Path) -> list[str]:
    """Everything under a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("state_dtype", [None, "int8"])
def test_a_dry_run_tells_what_the_run_will_place_and_writes_nothing(
    run: Run, config: RunConfig, tmp_path: Path, state_dtype: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spill, yaml_file = tmp_path / "spill", tmp_path / "run.yaml"
    yaml_file.write_text(to_yaml(config))
    more = ["--state-dtype", state_dtype] if state_dtype else []
    asked = ["finetune", "--config", str(yaml_file), "--host-memory", "24MiB", "--disk", str(spill)]
    before = tree(tmp_path)
    assert run(*asked, *more, "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert tree(tmp_path) == before
    assert said["config"]["memory"]["host_memory"] == "24MiB"
    assert said["config"]["data"]["seq_len"] == 32
    assert said["sequences"] > 0

    # The same as a run places.
    managed = offload.from_pretrained(
        config.model, dtype=torch.float32, host_memory="24MiB", disk=spill,
        tuning=Tuning(machine=MACHINE),
    )  # fmt: skip
    optimizer = make_optimizer(managed, config)
    tuning = Tuning(machine=MACHINE)
    offload.wrap(managed, optimizer, state_dtype=state_dtype, tuning=tuning)
    with offload.runtime(managed) as runtime:
        space, ledger = runtime.parts.engine.space, runtime.parts.engine.ledger
        placed = said["placement"]
        assert placed["spill_bytes"] == runtime.stats()["tiers"]["disk"]["used_bytes"]
        assert sum(part["chunks"] for part in placed["parts"]) == len(space.chunks)
        assert placed["chunk_bytes"] == max(c.size_bytes for c in space.chunks)
        assert placed["fixed_bytes"] == ledger.fixed_bytes
        assert placed["host_bytes"] == ledger.budget_bytes


def test_a_dry_run_for_people_is_yaml_and_a_table(
    run: Run, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["finetune", "--model", config.model, "--data", str(config.data.path), "--output",
            config.output, "--seq-len", "32", "--host-memory", "1GiB", "--dry-run"]  # fmt: skip
    assert run(*told) == 0
    said = capsys.readouterr().out
    settings, rest = said.split("\ntiny", 1) if "\ntiny" in said else said.split(config.model + ":")
    assert yaml.safe_load(settings)["data"]["seq_len"] == 32
    for part in ("gradients", "optimizer state", "chunks of", "disk: not used", "dry run"):
        assert part in rest
    assert run(*told, "-q") == 0
    assert capsys.readouterr().out == ""
    assert not Path(config.output).exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--host-memory", "1KiB"], "give at least"),
        (["--host-memory", "1KiB", "--disk", "spill"], "give at least"),
        (["--host-memory", "24MiB", "--disk", "spill", "--disk-memory", "4KiB"], "spill file"),
        (["--host-memory", "24MiB", "--disk", "words.txt/x"], "choose another --disk"),
        (["--output", "words.txt/x"], "choose another --output"),
        (["--seq-len", "65"], "64 positions"),
        (["--data", "none.txt"], "no data at"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    run: Run, config: RunConfig, tmp_path: Path, more: list[str], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    asked = ["finetune", "--model", config.model, "--data", "words.txt", "--output", "run"]
    assert run(*asked, "--seq-len", "32", *more, "--dry-run") == 2
    assert message in capsys.readouterr().err
    assert tree(tmp_path) == before
    Path(config.output, "model").mkdir(parents=True)
    assert run(*asked, "--seq-len", "32", "--dry-run") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_generate_takes_flags_over_yaml_over_defaults(
    run: Run, rows: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.yaml"
    file.write_text(yaml.safe_dump(rows))
    asked = ["generate", "--config", str(file), "--temperature", "0.25", "--no-with-prompt"]
    before = tree(tmp_path)
    assert run(*asked, "--dry-run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert tree(tmp_path) == before
    sampling = said["config"]["sampling"]
    assert sampling["temperature"] == 0.25  # the flag
    assert (sampling["max_new_tokens"], sampling["stop"]) == (3, ["zz"])  # the file
    assert sampling["top_p"] == 1.0  # the default
    assert said["config"]["data"]["with_prompt"] is False
    assert (said["prompts"], said["done_before"]) == (2, 0)
    assert [part["name"] for part in said["placement"]["parts"]] == ["weights"]

    assert run(*asked, "--stop", "yy", "-v") == 0
    words = capsys.readouterr().out
    assert "temperature: 0.25" in words  # -v shows the settings
    assert "2 of 2 rows" in words
    identity = json.loads((tmp_path / "rows.jsonl.run.json").read_text())
    assert (identity["temperature"], identity["stop"]) == (0.25, ["yy"])
    written = (tmp_path / "rows.jsonl").read_text()
    assert run(*asked, "--stop", "yy", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["done_before"] == 2
    assert run(*asked, "--dry-run") == 2
    assert "were made with stop" in capsys.readouterr().err
    assert run(*asked, "--stop", "yy", "-q") == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "rows.jsonl").read_text() == written


def test_verbose_shows_where_an_error_came_from(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for verbose in (False, True):
        assert run("finetune", "--lr", "-1", *(["-v"] if verbose else [])) == 2
        said = capsys.readouterr().err
        assert said.splitlines()[-1].startswith("error: optimizer.lr must be at least 0")
        assert ("Traceback" in said) is verbose
    assert run("finetune", "-v", "-q") == 2
    assert "contradict" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_is_130(
    run: Run, monkeypatch: pytest.MonkeyPatch, config: RunConfig
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offload.finetune.finetune", interrupted)
    assert run("finetune", "--model", config.model) == 130


@pytest.mark.parametrize(
    ("typed", "found"),
    [("offload gen", "generate"), ("offload finetune --warm", "--warmup")],
)
def test_the_shell_completes_commands_and_flags(
    run: Run, typed: str, found: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("_OFFLOAD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(typed.count(" ")))
    assert run() == 0
    assert capsys.readouterr().out.split() == [found]


def test_completion_can_be_installed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert "--install-completion" in said
    assert "--show-completion" in said


def test_yaml_that_finetune_wrote_is_what_probe_and_finetune_read() -> None:
    config = build_config({"memory.disk": "/scratch"})
    assert yaml.safe_load(to_yaml(config))["memory"]["disk"] == "/scratch"
