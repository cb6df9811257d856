"""Configuration: YAML round trip, precedence, and errors that name the key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload.finetune_cli import effective_config
from offload.generateconfig import GenerateConfig, build_generate
from offload.planconfig import PlanConfig
from offload.runconfig import (
    PRETRAINED_LR,
    RANDOM_INIT_LR,
    RunConfig,
    build_config,
    with_absolute_paths,
)
from offload.settings import InputError, flags_of, key_paths, read_yaml, to_yaml


def test_yaml_round_trip_is_equal(tmp_path: Path) -> None:
    config = build_config(
        {
            "model": "org/name",
            "data.path": "some/ünïcode.txt",
            "optimizer.lr": 1e-5,
            "memory.host_memory": "1.5GiB",
            "memory.device_memory": 1 << 30,
            "compute.bf16": True,
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert build_config(read_yaml(path, RunConfig)) == config


def test_exponent_without_dot_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optimizer:\n  lr: 1e-4\n")
    assert build_config(read_yaml(path, RunConfig)).optimizer.lr == 1e-4


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"optimizer.lrr": 1}, ["optimizer.lrr", "did you mean 'optimizer.lr'"]),
        ({"lr": 1e-4}, ["'lr'", "did you mean 'optimizer.lr'"]),
        ({"modle": "x"}, ["'modle'", "did you mean 'model'"]),
        ({"zzzz": 1}, ["zzzz", "known keys: model"]),
        ({"schedule.steps": "many"}, ["schedule.steps", "whole number", "'many'"]),
        ({"schedule.steps": True}, ["schedule.steps", "whole number"]),
        ({"schedule.steps": 0}, ["schedule.steps", "at least 1"]),
        ({"optimizer.lr": "fast"}, ["optimizer.lr", "a number"]),
        ({"optimizer.lr": float("nan")}, ["optimizer.lr", "nan"]),
        ({"data.eval_fraction": 1.0}, ["data.eval_fraction", "below 1"]),
        ({"compute.bf16": "yes"}, ["compute.bf16", "true or false"]),
        ({"compute.dtype": "float16"}, ["compute.dtype", "float32 or bfloat16"]),
        ({"optimizer.state_dtype": "fp8"}, ["optimizer.state_dtype", "bf16 or int8", "'fp8'"]),
        ({"memory.host_memory": "8 gigs"}, ["memory.host_memory", "8GiB"]),
        ({"memory.disk_memory": "8GiB"}, ["memory.disk_memory", "--disk"]),
        ({"schedule.warmup": 9, "schedule.steps": 9}, ["schedule.warmup", "lower"]),
        ({"model": 3}, ["model", "text"]),
    ],
)
def test_bad_value_names_key_and_remedy(values: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build_config(values)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "text", ["- a\n- b\n", "data: 3\n", "a: [1\n", "data:\n  seq_len: 8\n nonsense"]
)
def test_bad_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"broken\.yaml"):
        read_yaml(path, RunConfig)


def test_defaults_follow_the_model_and_steps() -> None:
    assert build_config({}).optimizer.lr == RANDOM_INIT_LR
    assert build_config({"model": "org/name"}).optimizer.lr == PRETRAINED_LR
    assert build_config({"schedule.steps": 6}).schedule.warmup == 0
    assert build_config({"schedule.steps": 40}).schedule.warmup == 4


def test_flags_override_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("data:\n  seq_len: 64\n  batch_size: 3\nschedule:\n  steps: 7\n")
    config = effective_config({"data.seq_len": 32}, str(path), resume=False)
    assert (config.data.seq_len, config.data.batch_size, config.schedule.steps) == (32, 3, 7)


def test_resume_starts_from_the_runs_own_configuration(tmp_path: Path) -> None:
    made = build_config({"output": str(tmp_path), "data.seq_len": 77})
    (tmp_path / "config.yaml").write_text(to_yaml(made))
    given = {"output": str(tmp_path)}
    assert effective_config(given, None, resume=True).data.seq_len == 77
    assert effective_config(given, None, resume=False).data.seq_len != 77


def test_absolute_paths_leave_hub_names_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = build_config({"model": "org/name", "data.path": "d/*.txt", "output": "o"})
    absolute = with_absolute_paths(config)
    assert absolute.model == "org/name"
    assert absolute.data.path == str(tmp_path / "d/*.txt")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert with_absolute_paths(config).model == str(tmp_path / "org" / "name")
    assert replace(absolute, output="x", model="m") != config


@pytest.mark.parametrize("owner", [RunConfig, GenerateConfig, PlanConfig])
def test_every_key_has_a_flag_and_no_other(owner: type) -> None:
    assert sorted(flags_of(owner).values()) == sorted(key_paths(owner))


def test_keys_that_both_commands_have_are_the_same() -> None:
    ours, theirs, plans = map(flags_of, (RunConfig, GenerateConfig, PlanConfig))
    shared = ours.keys() & theirs.keys()
    assert {"model", "output", "batch_size", "dtype", "seed", "disk", "host_memory"} <= shared
    assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
    planned = plans.keys() & (ours.keys() | theirs.keys())
    assert {"model", "batch_size", "state_dtype", "dtype", "max_new_tokens", "disk"} <= planned
    assert {k: plans[k] for k in planned} == {k: (ours | theirs)[k] for k in planned}


ROWS = {"model": "org/name", "output": "rows.jsonl", "data.prompts": "p.jsonl"}


def test_generate_round_trips_and_takes_one_stop_or_several(tmp_path: Path) -> None:
    config = build_generate(ROWS | {"sampling.stop": ["a", "b"], "memory.host_memory": "2GiB"})
    path = tmp_path / "rows.yaml"
    path.write_text(to_yaml(config))
    assert build_generate(read_yaml(path, GenerateConfig)) == config
    assert config.sampling.stop == ("a", "b")
    assert build_generate(ROWS | {"sampling.stop": "a"}).sampling.stop == ("a",)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"data.prompts": None}, ["data.prompts must be text"]),
        ({"sampling.stop": 3}, ["sampling.stop", "text", "3"]),
        ({"sampling.temprature": 1.0}, ["did you mean 'sampling.temperature'"]),
        ({"data.micro_batches": 2}, ["needs data.batch_size", "--batch-size"]),
        ({"data.batch_size": 0}, ["data.batch_size", "at least 1"]),
        ({"memory.disk_memory": "1GiB"}, ["--disk"]),
    ],
)
def test_bad_settings_of_generate_are_named(changed: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build_generate(ROWS | changed)
    for part in parts:
        assert part in str(caught.value)


def test_what_is_missing_is_asked_for_by_its_flag_and_key() -> None:
    with pytest.raises(InputError, match=r"data\.prompts is missing: give --prompts, or"):
        build_generate({"model": "m", "output": "o"})
