"""The examples run as they stand: more than fits, the disk in use, the numbers of the plain run."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.tiers.spec import parse_size
from tests.conftest import MACHINE

FOLDER = Path(__file__).parent.parent / "examples"
LINES = 60
NEEDS = {"trainer": "accelerate", "lora": "peft"}
BUDGET_BYTES = parse_size("12MiB")
ADAPTER_BYTES = 6 * 2 * 2 * 8 * 256 * 4 * 4  # layers, matrices, halves; weight, gradient, moments

Main = Callable[[list[str]], tuple[list[Any], dict[str, Any]]]


@pytest.fixture
def main_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Main]:
    """The ``main`` of an example, which then measures no disk. Skips what is not installed."""

    def get(name: str) -> Main:
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        monkeypatch.setattr("offload.api.cached_probe", lambda folder: MACHINE)
        main: Main = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]
        return main

    return get


def assert_larger_than_its_budget(stats: dict[str, Any]) -> None:
    host, disk = stats["tiers"]["host"], stats["tiers"]["disk"]
    assert host["peak_bytes"] <= host["budget_bytes"] == BUDGET_BYTES < disk["used_bytes"]
    assert stats["counters"]["evictions"] > 0
    assert stats["lanes"]["read"]["bytes"] > disk["used_bytes"]


@pytest.mark.parametrize("name", ["plain_loop", "trainer", "lora"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_training_example(main_of: Callable[[str], Main], name: str, tmp_path: Path) -> None:
    main = main_of(name)
    losses, stats = main(["--steps", "4", "--disk", str(tmp_path)])
    assert_larger_than_its_budget(stats)
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert losses == main(["--steps", "4", "--plain"])[0]
    if name == "lora":  # the base is read; what is written is adapters and their state at most
        assert stats["step_bytes"]["read"] > BUDGET_BYTES
        assert stats["step_bytes"]["write"] <= ADAPTER_BYTES
    else:
        assert stats["step_bytes"]["write"] > 0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_adapters_over_a_base_that_was_loaded_in_tiers(
    main_of: Callable[[str], Main], tmp_path: Path
) -> None:
    main = main_of("lora")
    runpy.run_path(str(FOLDER / "lora.py"))["small_model"]().save_pretrained(tmp_path / "model")
    asked = ["--steps", "3", "--model", str(tmp_path / "model")]
    losses, stats = main([*asked, "--disk", str(tmp_path)])
    assert_larger_than_its_budget(stats)
    assert losses == main([*asked, "--plain"])[0]


def test_inference_example(main_of: Callable[[str], Main], tmp_path: Path) -> None:
    main = main_of("inference")
    rows, stats = main(["--new-tokens", "4", "--disk", str(tmp_path)])
    assert_larger_than_its_budget(stats)
    assert [len(row) for row in rows] == [4, 4, 4]
    assert rows == main(["--new-tokens", "4", "--plain"])[0]


def test_every_example_is_short_listed_and_tested() -> None:
    listed = (FOLDER.parent / "docs" / "README.md").read_text()
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert names == ["inference", "lora", "plain_loop", "trainer"]
    for name in names:
        assert f"../examples/{name}.py" in listed
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) < LINES
