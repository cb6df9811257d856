"""The report as files: trace events that viewers take, the command, a fine-tuning run's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from offload import cli
from offload.block import BlockStep
from offload.errors import OffloadError
from offload.finetune import OffloadEngine, finetune
from offload.metrics import StepReport
from offload.progress import PlainProgress
from offload.report import report_data
from offload.report_files import render, rendered
from offload.report_trace import ORDER, tracks
from offload.rundir import RunDirectory
from offload.runreport import RowsReport, history_of, read_report, report_run
from tests.conftest import adamw
from tests.report_data import HUNDRED_B, SMALL, made
from tests.test_finetune_managed import TUNING
from tests.test_report import HOST_BYTES, steps
from tests.tiny import tiny_run, write_tiny_model
from tests.trace_format import faults

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

Command = Callable[..., int]


@pytest.fixture
def data(zoo: Zoo, manage: Manager) -> dict[str, Any]:
    """Of a small run from disk."""
    model: Any = zoo.build("llama")
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=HOST_BYTES)
    steps(model, optimizer, 4)
    return report_data(run)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run ``offload ARGUMENTS`` in this process; its exit status."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["offload", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0)

    return run


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that shows which runs it was given."""
    stand_in = SimpleNamespace(
        render=lambda a: f"one {a['task']}",
        render_comparison=lambda a, b: f"two {a['task']} {b['task']}",
    )
    monkeypatch.setitem(sys.modules, "offload.report_html", stand_in)


def test_trace_events_are_well_formed(data: dict[str, Any]) -> None:
    """As the Trace Event Format wants them, and nothing of the step is lost."""
    trace = json.loads(rendered(data, "step.trace.json"))
    events = trace["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "X", "C"}
    assert all({"name", "pid", "tid"} <= e.keys() for e in events)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    processes = {e["pid"] for e in events if e["name"] == "process_name"}
    step = data["step"]
    for event in events:
        assert event["pid"] in processes
        if event["ph"] == "X":
            assert (event["pid"], event["tid"]) in named
            assert 0 <= event["ts"] <= event["ts"] + event["dur"] <= step["step_s"] * 1e6 + 1
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int) for value in event["args"].values())
        else:
            assert isinstance(event["args"].get("name", event["args"].get("sort_index")), str | int)
    spans = [e for e in events if e["ph"] == "X"]
    read = step["lanes"]["read"]
    assert sum(e["args"]["bytes"] for e in spans if e["cat"] == "read") == read["bytes"]
    assert {e["cat"] for e in spans} == {"phase", "stalls", *step["lanes"]}
    assert {"stalls", "phases", *step["lanes"]} <= set(ORDER)
    counters = [e for e in events if e["name"] == "host bytes"]
    host = step["memory"]["host"]
    assert [sum(e["args"].values()) for e in counters] == host["used_bytes"]


def test_viewers_take_all_of_the_trace(data: dict[str, Any]) -> None:
    for of in (data, made(SMALL), made(HUNDRED_B), data | {"step": None}):
        assert faults(json.loads(rendered(of, "x.trace.json"))) == []


def test_transfers_that_overlap_stand_below_each_other(data: dict[str, Any]) -> None:
    """A lane has several workers. Viewers would lose the end of the second transfer."""
    spans: dict[str, list[Any]] = {
        "start_s": [0.0, 1.0, 2.0, 2.5], "end_s": [2.0, 3.0, 2.2, 4.0], "chunk": [0, 1, 2, 3],
        "module": [-1] * 4, "bytes": [1, 2, 3, 4],
    }  # fmt: skip
    assert tracks(spans) == [[0, 2, 3], [1]]
    data["step"]["lanes"]["read"] |= {"bytes": 10, "spans": spans}
    trace = json.loads(rendered(data, "x.trace.json"))
    assert faults(trace) == []
    reads = [e for e in trace["traceEvents"] if e.get("cat") == "read"]
    assert sum(e["args"]["bytes"] for e in reads) == 10
    threads = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"]
               if e["name"] == "thread_name"}  # fmt: skip
    assert {threads[e["tid"]] for e in reads} == {"read", "read 2"}


SLICE = {"ph": "X", "name": "a", "cat": "c", "ts": 2, "dur": 3, "pid": 1, "tid": 1}
COUNTER = {"ph": "C", "name": "m", "ts": 1, "pid": 1, "args": {"a": 1}}
NAMED = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "p"}},
         {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "t"}}]  # fmt: skip


@pytest.mark.parametrize(
    ("events", "fault"),
    [
        ([SLICE | {"dur": -1}], "below zero"),
        ([SLICE | {"pid": "1"}], "pid is '1'"),
        ([SLICE | {"tid": 2}], "thread 2 has no name"),
        ([{k: v for k, v in SLICE.items() if k != "ts"}], "ts is None"),
        ([SLICE | {"colour": "red"}], "unknown fields"),
        ([SLICE, SLICE | {"ts": 4}], "overlaps"),
        ([SLICE, SLICE | {"ts": 0, "dur": 1}], "not in order"),
        ([COUNTER, COUNTER | {"ts": 0}], "not in order"),
        ([COUNTER, COUNTER | {"args": {"b": 1}}], "other series"),
        ([COUNTER | {"args": {"a": "1"}}], "without numbers"),
        ([COUNTER | {"pid": 2}], "process 2 has no name"),
        ([NAMED[0]], "named twice"),
        ([NAMED[1] | {"args": {}}], "metadata"),
        ([{"ph": "Q"}], "no phase"),
    ],
)
def test_faults_of_a_trace_are_seen(events: list[Any], fault: str) -> None:
    whole = [*NAMED, SLICE | {"ts": 0, "dur": 1}, COUNTER]
    assert faults({"traceEvents": whole}) == []
    assert fault in " ".join(faults({"traceEvents": [*NAMED, *events]}))


def test_without_a_step_the_trace_is_empty(data: dict[str, Any]) -> None:
    trace = json.loads(rendered(data | {"step": None}, "x.trace.json"))
    assert trace["traceEvents"] == []


def test_a_build_without_a_page_says_so(
    data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "offload.report_html", None)
    with pytest.raises(OffloadError, match=r"has no page.*\.json"):
        render(data)


@pytest.mark.usefixtures("page")
def test_a_fine_tuning_run_keeps_its_report(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run(write_tiny_model(tmp_path / "model"), tmp_path)
    finetune(config, observer=PlainProgress(StringIO()), engine=OffloadEngine(TUNING))
    run = Path(config.output)
    kept = json.loads((run / "report.json").read_text())
    assert kept["task"] == "finetune"
    assert kept["history"]["step"] == [1, 2, 3, 4, 5, 6]
    assert all(loss > 0 for loss in kept["history"]["loss"])
    assert kept["step"] is not None
    assert command("report", str(run), "--trace", str(tmp_path / "t.json")) == 0
    assert (run / "report.html").read_text() == "one finetune"
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert kept["verdict"]["text"] in capsys.readouterr().out
    assert command("report", str(run), str(run / "report.json")) == 0
    assert (run / "comparison.html").read_text() == "two finetune finetune"
    capsys.readouterr()
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 7, "loss": 0.5}\n{"step": 8, "lo')
    assert command("report", str(run), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["history"]["step"] == [1, 2, 3, 4, 5, 6, 7]
    assert shown["history"]["step_s"][-1] is None


@pytest.mark.usefixtures("page")
def test_a_generation_keeps_its_report_beside_the_rows(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    model, asked, out = write_tiny_model(tmp_path / "m"), tmp_path / "in.jsonl", tmp_path / "o.l"
    asked.write_text("".join(json.dumps({"prompt": "cat " * n}) + "\n" for n in range(1, 6)))
    told = ["--batch-size", "2", "--max-new-tokens", "12", "--host-memory", "64MiB", "--json"]
    assert command("generate", "--model", str(model), "--prompts", str(asked), "--output",
                   str(out), *told) == 0  # fmt: skip
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    steps = [event for event in steps if event["event"] == "step"]
    kept = json.loads((tmp_path / "o.l.report.json").read_text())
    assert kept["task"] == "generate"
    assert kept["history"]["step"] == [event["step"] for event in steps]
    assert kept["history"]["step_s"] == [round(event["step_s"], 6) for event in steps]
    assert kept["step"] is not None
    assert kept["step"]["memory"]["host"]["kinds"]["kv"][0] > 0
    assert command("report", str(out), "--trace", str(tmp_path / "t.json")) == 0
    assert (tmp_path / "o.l.report.html").read_text() == "one generate"
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert command("report", str(out), str(out)) == 0
    assert (tmp_path / "comparison.html").read_text() == "two generate generate"
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    target = tmp_path / "new" / "page.html"
    dry = ["report", str(out), "--output", str(target), "--dry-run"]
    assert command(*dry, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"event": "dry-run", "writes": [str(target)]}
    assert command("report", str(out), "--trace", str(asked / "t.json"), "--dry-run") == 2
    assert "cannot write" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    assert command(*dry[:-1]) == 0
    assert target.exists()
    assert command("report", str(asked)) == 2
    assert "in.jsonl: offload finetune writes" in capsys.readouterr().err


class Told:
    """A run that is asked for reports: how often, and after how many steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: Any) -> None:
        self.made: list[int] = []
        self.step = step
        monkeypatch.setattr("offload.report.report_data", self._data)

    def _data(self, _run: Any, _task: str, history: Any) -> dict[str, Any]:
        self.made.append(len(history["step"]))
        return {"step": self.step}


@pytest.mark.parametrize(
    ("count", "prefill_at", "step", "made"),
    [
        (3, (1,), {}, [3]),  # short: at the end
        (20, (1,), {}, [8, 16]),
        (20, (1, 8, 9), {}, [10, 20]),  # rows begin: no example
        (9, (1,), None, [8, 9]),  # none followed a plan
    ],
)
def test_when_a_generation_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, prefill_at: tuple[int, ...],
    step: Any, made: list[int],
) -> None:  # fmt: skip
    told = Told(monkeypatch, step)
    report = RowsReport(SimpleNamespace(), tmp_path / "rows", PlainProgress(StringIO()))  # type: ignore[arg-type]
    for n in range(1, count + 1):
        report.step(BlockStep((), 4, 9 if n in prefill_at else 0, 0.5, None, 1))
    report.finish()
    assert told.made == made
    kept = json.loads((tmp_path / "rows.report.json").read_text())["history"]
    assert kept["step"] == list(range(1, count + 1))
    assert set(kept["tokens_per_s"]) == {8.0}


def test_what_is_no_report_is_refused(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("report", str(tmp_path)) == 2
    assert "no report of" in capsys.readouterr().err
    file = tmp_path / "report.json"
    file.write_text("[]")
    with pytest.raises(OffloadError, match="not the data"):
        read_report(file)
    file.write_text('{"schema": 2}')
    with pytest.raises(OffloadError, match="schema 2"):
        read_report(tmp_path)


def test_a_report_that_fails_ends_no_run(tmp_path: Path) -> None:
    class Full:
        def report(self, path: Path, *, task: str, history: Any) -> None:
            raise OSError("disk is full")

    class Notes(PlainProgress):
        said = ""

        def note(self, text: str) -> None:
            self.said = text

        def step(self, report: StepReport) -> None:
            """Nothing."""

    notes = Notes(StringIO())
    rows = RowsReport(SimpleNamespace(), tmp_path / "rows", notes)  # type: ignore[arg-type]
    rows.step(BlockStep((), 4, 0, 0.5, None, 1))
    rows.finish()
    assert "no report was written: AttributeError" in notes.said
    report_run(Full(), RunDirectory(tmp_path), notes)
    assert "disk is full" in notes.said
    assert history_of(tmp_path / "none.jsonl")["loss"] == []
