"""A report's data as files: JSON, a trace, a page. Needs neither torch nor a run."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from offload.errors import OffloadError
from offload.report_trace import trace_events


def rendered(data: dict[str, Any], name: str) -> str:
    """The text of a file of this name. Raises OffloadError for a name that says no form."""
    if name.endswith(".trace.json"):
        return compact(trace_events(data))
    if name.endswith(".json"):
        return compact(data)
    if name.endswith((".html", ".htm")):
        return render(data)
    raise OffloadError(
        f"{name}: a report is written to a name that ends in .html, .json (its data) or "
        ".trace.json (for Perfetto)"
    )


def render(data: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """The page of a run, or of two. Raises OffloadError where this build has none."""
    try:
        page: Any = import_module("offload.report_html")
    except ModuleNotFoundError as missing:
        if missing.name != "offload.report_html":
            raise
        raise OffloadError(
            "this build has no page for reports (offload/report_html.py): write the data "
            "(.json) or the trace (.trace.json) instead"
        ) from missing
    return str(page.render(data) if other is None else page.render_comparison(data, other))


def compact(data: Any) -> str:
    """JSON without blanks. Raises ValueError for what is no number."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    fresh = path.with_name(f"{path.name}.tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
