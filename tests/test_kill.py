"""P5 for real: kill -9 in the middle of a step, then ``--resume``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

OPTIONS = [
    "--model", "tiny-llama-30m", "--host-memory", "128MiB", "--steps", "6", "--seq-len", "32",
    "--batch-size", "1", "--eval-fraction", "0.002", "--eval-every", "0", "--save-every", "2",
]  # fmt: skip


def _command(*options: str) -> list[str]:
    return [sys.executable, "-c", "from offload.cli import main; main()", "finetune", *options]


def _losses(output: Path) -> list[float]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_losses_after_kill_9_and_resume_are_those_of_the_uninterrupted_run(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(20000)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    common = [*OPTIONS, "--data", str(data), "--disk", str(tmp_path / "spill")]
    subprocess.run(_command(*common, "--output", str(whole)), check=True, capture_output=True)
    process = subprocess.Popen(
        _command(*common, "--output", str(cut)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(_losses(cut)) < 3 and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len(_losses(cut)) < 6
    subprocess.run(
        _command("--config", str(cut / "config.yaml"), "--resume"), check=True, capture_output=True
    )
    assert len(_losses(whole)) == 6
    assert _losses(cut) == _losses(whole)
