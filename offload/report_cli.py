"""``offload report``: the page of a run, or of two side by side, from what the runs wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from offload import options
from offload.command import Voice, voice
from offload.runreport import read_report
from offload.settings import InputError
from offload.writable import check_writable


def report(
    context: typer.Context,
    run: Annotated[
        str, Argument(help="A run's directory, a file of generated rows, or a report's .json.")
    ],
    other: Annotated[str | None, Argument(help="A second one, to compare with.")] = None,
    output: Annotated[
        str | None, Option(help="The page; without: report.html (comparison.html) in the run.")
    ] = None,
    trace: Annotated[
        str | None, Option(help="Also write the first run's step for ui.perfetto.dev here.")
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Show where memory and time of a run's last planned step went, and what would help.

    With --json the data is printed, and no page is made without --output.
    """
    from offload.report_files import compact, render, write_text
    from offload.report_trace import trace_events

    told = voice(context, as_json=as_json, verbose=verbose, quiet=quiet)
    places = [Path(name).expanduser() for name in (run, other) if name is not None]
    reports = [read_report(place) for place in places]
    page = Path(output).expanduser() if output else None if as_json else _beside(places)
    events = Path(trace).expanduser() if trace else None
    if dry_run:
        _dry_run([path for path in (page, events) if path is not None], told)
        return
    if as_json:
        for data in reports:
            typer.echo(compact(data))
    for file in (page, events):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
    if events is not None:
        write_text(events, compact(trace_events(reports[0])))
    if page is None:
        return
    write_text(page, render(*reports))
    for data in reports:
        told.note(_headline(data))
    told.note(f"written to {page}")


def _dry_run(files: list[Path], told: Voice) -> None:
    """The reports could be read; nothing else is done."""
    for file in files:
        try:
            check_writable(file.parent, dry=True)
        except OSError as error:
            raise InputError(f"cannot write {file}: {error.strerror}; choose another") from error
    if told.as_json:
        typer.echo(json.dumps({"event": "dry-run", "writes": [str(file) for file in files]}))
        return
    for file in files:
        told.note(f"would write {file}")
    told.note("nothing was written: this was a dry run")


def _beside(places: list[Path]) -> Path:
    first = places[0]
    folder = first if first.is_dir() else first.parent
    if len(places) > 1:
        return folder / "comparison.html"
    rows = not first.is_dir() and first.suffix != ".json"
    return folder / (f"{first.name}.report.html" if rows else "report.html")


def _headline(data: dict[str, Any]) -> str:
    return "\n  ".join([str(data["verdict"]["text"]), *data["verdict"]["advice"]])
