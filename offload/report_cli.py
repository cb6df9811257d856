"""``offload report``: the page of a run, or of two side by side, from what the runs wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from offload import options
from offload.command import voice
from offload.runreport import read_report


def report(
    context: typer.Context,
    run: Annotated[str, Argument(help="A run's directory, a file of generated rows, or the .json of a report.")],
    other: Annotated[str | None, Argument(help="A second one, to compare with.")] = None,
    output: Annotated[
        str | None, Option(help="The page; without: report.html (comparison.html) in the run.")
    ] = None,
    trace: Annotated[
        str | None, Option(help="Also write the first run's step for ui.perfetto.dev here.")
    ] = None,
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
    if as_json:
        for data in reports:
            typer.echo(compact(data))
    if trace is not None:
        write_text(Path(trace).expanduser(), compact(trace_events(reports[0])))
    if output is None and as_json:
        return
    page = Path(output).expanduser() if output else _beside(places)
    write_text(page, render(*reports))
    for data in reports:
        told.note(_headline(data))
    told.note(f"written to {page}")


def _beside(places: list[Path]) -> Path:
    first = places[0]
    folder = first if first.is_dir() else first.parent
    if len(places) > 1:
        return folder / "comparison.html"
    rows = not first.is_dir() and first.suffix != ".json"
    return folder / (f"{first.name}.report.html" if rows else "report.html")


def _headline(data: dict[str, Any]) -> str:
    return "\n  ".join([str(data["verdict"]["text"]), *data["verdict"]["advice"]])
