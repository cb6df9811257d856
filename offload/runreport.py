"""The report in a fine-tuning run's directory: the last planned step, and all steps' losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from offload.errors import OffloadError
from offload.progress import Observer
from offload.rundir import RunDirectory

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
        observer.note(f"warning: no report was written: {type(error).__name__}: {error}")


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
    """The report of a run directory (with what its metrics know by now), or a ``.json`` of one.

    Raises OffloadError where there is none, or it is not one.
    """
    rundir = RunDirectory(run)
    file = rundir.report if run.is_dir() else run
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = data["schema"]
    except FileNotFoundError as error:
        raise OffloadError(
            f"no report in {run}: offload finetune writes {rundir.report.name} there at its "
            "checkpoints and at its end, offload.runtime(model).report(file) anywhere"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise OffloadError(f"{file} is not the data of a report ({error!r})") from error
    if schema != 1:
        raise OffloadError(f"{file} has schema {schema}; this version of offload reads schema 1")
    if run.is_dir() and rundir.metrics.exists():
        data["history"] = history_of(rundir.metrics)
    return data
