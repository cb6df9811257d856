"""The reports of runs: in a fine-tuning run's directory, or beside the rows of a generation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from offload.errors import OffloadError
from offload.progress import Observer
from offload.rundir import RunDirectory

if TYPE_CHECKING:
    from offload.block import BlockStep
    from offload.run import Runtime

FIRST_STEPS = 8  # of a generation, before it is reported: then the plan has its last times
COLUMNS = ("step", "loss", "step_s", "tokens_per_s")
History = Mapping[str, Sequence[float | None]]


class Reports(Protocol):
    """What of ``offload.runtime(model)`` is used here."""

    def report(self, path: Path, *, task: str, history: History | None) -> None: ...


def report_run(runtime: Reports, rundir: RunDirectory, observer: Observer) -> None:
    """Write the run's report. Where that fails it is said, and the run goes on."""
    try:
        runtime.report(rundir.report, task="finetune", history=history_of(rundir.metrics))
    except Exception as error:  # whatever it is, no week of training ends for the sake of a page
        _say_why(error, observer)


def _say_why(error: Exception, observer: Observer) -> None:
    observer.note(f"warning: no report was written: {type(error).__name__}: {error}")


def report_of_rows(rows: Path) -> Path:
    """Where the report of a generation stands: beside ``FILE``, ``FILE.report.json``."""
    return rows.with_name(rows.name + ".report.json")


class RowsReport:
    """The report of a generation, of a step in its midst: in its last ones few rows are left.

    Made after 8, 16, 32, ... steps, each time of the last step that followed a plan and in which no
    row began, and at the end of a run that was shorter. The end adds the seconds of all steps.
    """

    def __init__(self, runtime: Runtime, rows: Path, observer: Observer) -> None:
        self._runtime = runtime
        self._file = report_of_rows(rows)
        self._observer = observer
        self._history: dict[str, list[float]] = {"step": [], "step_s": [], "tokens_per_s": []}
        self._due = FIRST_STEPS
        self._data: dict[str, Any] | None = None

    def step(self, step: BlockStep) -> None:
        """A step is over."""
        count = len(self._history["step"]) + 1
        for name, value in (
            ("step", count), ("step_s", round(step.step_s, 6)),
            ("tokens_per_s", round(step.new_tokens / step.step_s, 3)),
        ):  # fmt: skip
            self._history[name].append(value)
        if count >= self._due and not step.prompt_tokens:
            self._due = 2 * count
            self._write(anew=True)

    def finish(self) -> None:
        """The last step is over, and the run has not been closed yet."""
        if self._history["step"]:
            self._write(anew=self._data is None or self._data["step"] is None)

    def _write(self, *, anew: bool) -> None:
        from offload.report import report_data, shortened
        from offload.report_files import compact, write_text

        try:
            if anew or self._data is None:
                self._data = report_data(self._runtime, "generate", self._history)
            self._data["history"] = shortened(self._history)
            write_text(self._file, compact(self._data))
        except Exception as error:  # as for training: the rows are what matters
            _say_why(error, self._observer)


def history_of(metrics: Path) -> dict[str, list[float | None]]:
    """The columns of a ``metrics.jsonl``; empty without one. A torn last line is passed over."""
    found: dict[str, list[float | None]] = {name: [] for name in COLUMNS}
    if not metrics.exists():
        return found
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # the run was killed, or is writing it now
        for name, column in found.items():
            column.append(values.get(name))
    return found


def read_report(run: Path) -> dict[str, Any]:
    """The report of a run directory (with what its metrics know by now), of a file of rows that was
    generated, or a ``.json`` of one.

    Raises OffloadError where there is none, or it is not one.
    """
    rundir = RunDirectory(run)
    file = rundir.report if run.is_dir() else run
    if not run.is_dir() and run.suffix != ".json":
        file = report_of_rows(run)
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = data["schema"]
    except FileNotFoundError as error:
        raise OffloadError(
            f"no report of {run}: offload finetune writes {rundir.report.name} into its directory "
            f"at its checkpoints and at its end, offload generate {report_of_rows(Path('FILE'))} "
            "beside its rows, offload.runtime(model).report(file) any file"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise OffloadError(f"{file} is not the data of a report ({error!r})") from error
    if schema != 1:
        raise OffloadError(f"{file} has schema {schema}; this version of offload reads schema 1")
    if run.is_dir() and rundir.metrics.exists():
        data["history"] = history_of(rundir.metrics)
    return data
