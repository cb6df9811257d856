"""Ctrl-C and SIGTERM for real: the first ends a run after its step, the second at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from offload.command import EXIT_CODES
from tests.forked import Scenario
from tests.tiny import WORDS, write_tiny_model

Ended = dict[str, tuple[int, Scenario]]


def finetune(model: Path, folder: Path) -> list[str]:
    """Far more steps than will be made; nothing would be saved but for the signal."""
    data = folder / "words.txt"
    data.write_text(WORDS * 40)
    return [
        "finetune", "--model", str(model), "--data", str(data), "--output", str(folder / "run"),
        "--host-memory", "64MiB", "--seq-len", "32", "--steps", "100000", "--eval-every", "0",
        "--save-every", "0",
    ]  # fmt: skip


def generate(model: Path, folder: Path) -> list[str]:
    """Far more rows than will be made, one after the other."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"cat {i}"}) + "\n" for i in range(2000)))
    return [
        "generate", "--model", str(model), "--prompts", str(prompts), "--output",
        str(folder / "rows.jsonl"), "--host-memory", "64MiB", "--max-new-tokens", "4",
        "--batch-size", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Exit status of each scenario; one process imports torch for all of them."""
    root = tmp_path_factory.mktemp("signals")
    model = write_tiny_model(root / "model")
    found = {}
    for name, command, when, number, twice in (
        ("finetune", finetune, "step      2/", signal.SIGINT, False),
        ("finetune twice", finetune, "the long step", signal.SIGINT, True),
        ("generate", generate, " 2/2000 rows", signal.SIGTERM, False),
        ("generate twice", generate, "the long step", signal.SIGINT, True),
    ):
        folder = root / name.replace(" ", "-")
        folder.mkdir()
        found[name] = Scenario(command(model, folder), when, number, str(folder), twice)
    asked = root / "scenarios.json"
    asked.write_text(json.dumps([asdict(s) for s in found.values()]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.forked", str(asked)],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    statuses = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(found, zip(statuses, found.values(), strict=True), strict=True))


def test_ctrl_c_ends_finetune_after_its_step_with_a_checkpoint(ended: Ended) -> None:
    status, scenario = ended["finetune"]
    assert status == 128 + signal.SIGINT
    assert status in EXIT_CODES
    run = Path(scenario.folder) / "run"
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{steps:06d}"]
    assert f"stopped after step {steps}; continue with: offload" in scenario.out.read_text()
    assert not (run / "model").exists()


def test_sigterm_ends_generate_after_its_step_with_its_rows(ended: Ended) -> None:
    status, scenario = ended["generate"]
    assert status == 128 + signal.SIGTERM
    assert status in EXIT_CODES
    rows = (Path(scenario.folder) / "rows.jsonl").read_text().splitlines()
    assert 2 <= len(rows) < 2000
    assert all(json.loads(row)["finish_reason"] for row in rows)
    assert "run the same command again" in scenario.out.read_text()


@pytest.mark.parametrize("name", ["finetune twice", "generate twice"])
def test_the_second_ctrl_c_ends_a_run_in_mid_step(ended: Ended, name: str) -> None:
    status, scenario = ended[name]
    assert status == -signal.SIGINT  # for a shell 130
    said = scenario.out.read_text()
    assert said.splitlines()[-1] == "the long step"
    assert "stopped" not in said
    assert not list((Path(scenario.folder) / "run").glob("checkpoints/*"))
