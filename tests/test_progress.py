"""What a run shows and keeps of its steps, and how it hears that it should stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from io import StringIO
from pathlib import Path

import pytest

from offload import __version__
from offload.interrupt import Interrupt
from offload.metrics import MetricsLog, StepReport
from offload.progress import JsonProgress, choose_observer, step_line
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


def test_the_time_left_is_that_of_steady_steps_and_of_what_lies_between() -> None:
    left = StepsLeft(100)
    first = left.after(1, 30.0, 1000.0, steady=False)
    assert (first.seconds, first.steady, str(first)) == (30.0 * 99, False, "under 49:30")
    steady = left.after(2, 2.0, 1002.0, steady=True)
    assert (steady.seconds, str(steady)) == (2.0 * 98, "3:16")
    left.after(3, 2.0, 1004.0, steady=True)
    slow = left.after(4, 50.0, 1054.0, steady=True)  # one that something else disturbed
    assert slow.seconds == 2.0 * 96
    saved = left.after(5, 2.0, 1064.0, steady=True)  # a checkpoint took as long as four steps
    assert saved.seconds == (2.0 + 8.0 / 4) * 95
    assert left.after(100, 2.0, 1066.0, steady=True).seconds == 0.0


def test_the_time_left_of_rows_counts_tokens_and_prompts_that_have_not_begun() -> None:
    left = RowsLeft(rows=4, prompt_tokens=40, tokens=10)
    assert not left.after(8.0, 2, 20, []).steady  # recorded: two rows begin
    assert not left.after(4.0, 2, 0, []).steady  # the first without prompts is recorded too
    assert left.after(1.0, 2, 0, []).seconds == 0.5 * (4 * 10 - 6) + 8.0 / 20 * 20
    for _ in range(7):
        now = left.after(1.0, 2, 0, [])
    assert not now.steady  # prompts are to come, and only the recorded first ones were seen
    now = left.after(1.0, 2, 0, [11, 11])
    assert now.seconds == 0.5 * (2 * 11) + 8.0
    now = left.after(3.0, 2, 20, [])
    assert (now.seconds, now.steady) == (0.5 * 20, True)


def test_quiet_keeps_warnings_and_verbose_adds_norms(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json in (False, True):
        observer = choose_observer(as_json=as_json, quiet=True)
        observer.note("a note")
        observer.warn("look")
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", "warning: look\n")
    report = StepReport(1, 1.0, 0.1, 10, 2.0, grad_norm=0.5)
    for verbose in (False, True):
        choose_observer(as_json=False, verbose=verbose).step(report)
        assert ("norm 0.500" in capsys.readouterr().out) is verbose


def test_json_progress_is_one_object_a_line() -> None:
    out = StringIO()
    progress = JsonProgress(out)
    progress.begin(0, 2)
    progress.step(StepReport(1, 1.0, 0.1, 10, 2.0))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["begin", "step"]
    assert events[1]["loss"] == 1.0
    assert events[1]["left_s"] == 2.0


BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("first", BOTH)
def test_the_second_signal_of_either_kind_finds_the_default_handler(
    first: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(number) for number in BOTH]
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        signal.raise_signal(first)
        assert interrupt.signal == first
        assert [signal.getsignal(number) for number in BOTH] == [signal.SIG_DFL] * 2
    assert [signal.getsignal(number) for number in BOTH] == before
    said = capfd.readouterr().err
    assert "once more to stop at once" in said
    assert "\x1b" not in said  # no terminal


def test_a_signal_gives_a_terminal_its_cursor_back(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The panel has hidden it, and the second signal leaves nobody to show it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Interrupt():
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.startswith("\x1b[?25h")


def test_runs_in_other_threads_leave_signals_alone() -> None:
    found: list[object] = []

    def work() -> None:
        with Interrupt() as interrupt:
            found.append((interrupt.signal, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]
    assert signal.getsignal(signal.SIGINT) is before


def test_version_comes_without_torch() -> None:
    code = (
        "import sys; from offload import cli; sys.argv = ['offload', '--version']\n"
        "try: cli.main()\n"
        "finally: assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")
