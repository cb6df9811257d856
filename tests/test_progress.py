"""What a run shows and keeps of its steps, and how it hears that it should stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

from offload import __version__
from offload.interrupt import Interrupt
from offload.metrics import MetricsLog, StepReport
from offload.progress import JsonProgress, step_line
from offload.remaining import Left, RowsLeft, StepsLeft, duration


def test_metrics_log_keeps_only_earlier_steps(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        for step in (1, 2, 3):
            log.write(StepReport(step, 1.0, 0.1, 10, 2.0))
    with MetricsLog(path, after_step=2) as log:
        log.write(StepReport(3, 0.5, 0.1, 10, 2.0))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 0.5)]
    assert rows[0]["tokens_per_s"] == 5.0
    assert "bound_s" not in rows[0]


def test_step_line_shows_what_matters() -> None:
    report = StepReport(
        9, 2.5, 1e-3, 1000, 2.0, bound_s=1.6, eval_loss=2.75, tier_bytes={"disk": 3 << 30}
    )
    line = step_line(report, 40, Left(62.0, True))
    for part in ("9/40", "2.5000", "2.7500", "500 tok/s", "1.25 x bound", "3.00 GiB", "1:02"):
        assert part in line
    assert duration(3723) == "1:02:03"


def test_json_progress_is_one_object_a_line() -> None:
    out = StringIO()
    progress = JsonProgress(out)
    progress.begin(0, 2)
    progress.step(StepReport(1, 1.0, 0.1, 10, 2.0))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["begin", "step"]
    assert events[1]["loss"] == 1.0


def test_the_second_signal_finds_the_default_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_version_comes_without_torch() -> None:
    code = (
        "import sys; from offload import cli; sys.argv = ['offload', '--version']\n"
        "try: cli.main()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")
