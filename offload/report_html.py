"""The memory profile as one HTML file that needs no network.

`render` takes the data object of one run, `render_comparison` those of two. The charts are Bokeh's,
whose script ships in its wheel and is written into the page; scripts run only if they are the very
ones written here (their hashes stand in the page's content policy), so no name of a tensor can.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.errors import OffloadError

if TYPE_CHECKING:
    from jinja2 import Environment

    from offload.report_charts import Charts

SCHEMA = 1
FOLDER = Path(__file__).parent / "report_page"
OUR_SCRIPTS = ("words.js", "charts.js", "hover.js", "table.js", "page.js")

Table = dict[str, Any]


def render(data: dict[str, Any]) -> str:
    """One run's report. Raises OffloadError where the data are of another version of the schema,
    or where the packages of the extra ``report`` are missing."""
    _check(data)
    charts = _charts()
    run = _run(data, charts, "", None)
    page = {"runs": {"": _names(data)}, "table": _module_table(data)}
    return _page("report.html.j2", {"run": run}, page, charts)


def render_comparison(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Two runs side by side, on the same clock and the same scales. Raises as `render` does."""
    _check(a)
    _check(b)
    from offload import report_view as view

    charts = _charts()
    scale = _scale(a, b)
    runs = {"a": _run(a, charts, "a-", scale), "b": _run(b, charts, "b-", scale)}
    context = runs | {
        "headline": view.difference(a, b),
        "rows": view.two_runs(a, b),
        "tiers": view.paired_tiers(runs["a"], runs["b"]),
        "history": _history({"a": a, "b": b}, charts, ""),
    }
    page = {"runs": {"a-": _names(a), "b-": _names(b)}, "table": _joined_table(a, b)}
    return _page("comparison.html.j2", context, page, charts)


def _check(data: dict[str, Any]) -> None:
    if data.get("schema") != SCHEMA:
        raise OffloadError(
            f"the report's data have schema {data.get('schema')}, this version of offload reads "
            f"{SCHEMA}: make the report with offload {data.get('offload', 'of that run')}"
        )
    try:
        import_module("bokeh")
        import_module("jinja2")
    except ModuleNotFoundError as missing:
        raise OffloadError(
            f"the report needs {missing.name}: pip install 'offload[report]'"
        ) from missing


def _charts() -> Charts:
    from offload.report_charts import Charts

    return Charts()


# -- what is on the page ------------------------------------------------------------------------


def _scale(*runs: dict[str, Any]) -> dict[str, float]:
    """The longest step and the highest reach of each tier, for runs that are to compare."""
    from offload.report_charts import memory_top_bytes

    scale: dict[str, float] = {}
    for step in (data["step"] for data in runs if data["step"]):
        scale["step_s"] = max(scale.get("step_s", 0.0), step["step_s"])
        for tier, memory in step["memory"].items():
            scale[tier] = max(scale.get(tier, 0.0), memory_top_bytes(memory))
    return scale


def _run(
    data: dict[str, Any], charts: Charts, prefix: str, scale: dict[str, float] | None
) -> dict[str, Any]:
    """What the page says of one run; its charts are added to ``charts``."""
    from offload import report_view as view

    run = {
        "prefix": prefix, "head": view.headline(data), "machine": view.machine_rows(data),
        "forecast": view.forecast_rows(data), "step": None, "history": [],
    }  # fmt: skip
    if not prefix:
        run["history"] = _history({"": data}, charts, prefix)
    if data["step"]:
        _add_step_charts(data, charts, prefix, scale or _scale(data))
        run["step"] = {
            "parts": view.step_parts(data), "tiers": view.tiers(data, prefix),
            "lanes": view.lane_rows(data), "lanes_chart": f"{prefix}lanes",
            "lane_kinds": view.lane_kinds(data),
            "stalls": view.longest_stalls(data), "notes": data["step"].get("notes", []),
        }  # fmt: skip
    return run


def _add_step_charts(
    data: dict[str, Any], charts: Charts, prefix: str, scale: dict[str, float]
) -> None:
    from offload.report_charts import lanes_chart, memory_chart

    step = data["step"]
    clock = charts.shared("clock", scale["step_s"])
    for tier, memory in step["memory"].items():
        plot = memory_chart(memory, step, clock, scale[tier])
        charts.add(f"{prefix}memory-{tier}", plot)
    charts.add(f"{prefix}lanes", lanes_chart(step, data["chunks"]["kind"], clock))


def _history(runs: dict[str, dict[str, Any]], charts: Charts, prefix: str) -> list[dict[str, str]]:
    """Charts over the whole run: those of which something is known."""
    from offload.report_charts import history_chart

    shown = []
    for key, label, from_zero in (
        ("loss", "Loss", False),
        ("step_s", "Seconds a step", True),
        ("tokens_per_s", "Tokens a second", True),
    ):
        series = {
            name: (run["history"]["step"], run["history"].get(key) or [])
            for name, run in runs.items()
        }
        plot = history_chart(series, label, from_zero=from_zero)
        if plot is not None:
            charts.add(f"{prefix}history-{key}", plot)
            shown.append({"chart": f"{prefix}history-{key}", "label": label})
    return shown


def _names(data: dict[str, Any]) -> dict[str, Any]:
    """What hovering looks up: the names of tensors (each stored once) and modules."""
    names: dict[str, int] = {}
    tensors = [
        [names.setdefault(name, len(names)) for name in chunk]
        for chunk in data["chunks"]["tensors"]
    ]
    stalls = data["step"]["stalls"] if data["step"] else None
    budgets = {
        tier: memory.get("budget_bytes") for tier, memory in data["step"]["memory"].items()
    } if data["step"] else {}  # fmt: skip
    return {
        "names": list(names), "tensors": tensors, "chunk_bytes": data["chunks"]["bytes"],
        "chunk_kind": data["chunks"]["kind"], "modules": [m["name"] for m in data["modules"]],
        "stalls": stalls, "budgets": budgets,
    }  # fmt: skip


def _column(key: str, label: str, kind: str, tip: str) -> dict[str, str]:
    return {"key": key, "label": label, "kind": kind, "tip": tip}


def _module_table(data: dict[str, Any]) -> Table:
    """The modules of one run, a column at a time."""
    columns = [
        _column("name", "Module", "text", "its name in the model"),
        _column("bytes", "Size", "bytes", "bytes of its weights"),
        _column(
            "home_bytes",
            "Lives in",
            "home",
            "where its weights, gradients and optimizer state are between uses",
        ),
        _column("compute_s", "Computes", "seconds", "time it computed in the step"),
        _column(
            "stall_s", "Stalls", "stall", "time in the step in which its computing stood still"
        ),
        _column("read_bytes", "Read", "bytes", "read from disk for it in the step"),
        _column("write_bytes", "Written", "bytes", "written to disk for it in the step"),
    ]
    rows = {c["key"]: [m[c["key"]] for m in data["modules"]] for c in columns}
    return {"columns": columns, "rows": rows, "sort": "stall_s"}


def _joined_table(a: dict[str, Any], b: dict[str, Any]) -> Table:
    """The modules of two runs, joined by name; 0 where a run lacks one."""
    columns = [
        _column("name", "Module", "text", "its name in the models"),
        _column("bytes", "Size", "bytes", "in the run where it is larger"),
    ]
    of = [{m["name"]: m for m in data["modules"]} for data in (a, b)]
    names = list(of[0] | of[1])
    rows: dict[str, list[Any]] = {"name": names}
    sizes = [[run.get(n, {}).get("bytes", 0) for n in names] for run in of]
    rows["bytes"] = [max(pair) for pair in zip(*sizes, strict=True)]
    kinds = (
        ("compute_s", "Computes", "seconds"),
        ("stall_s", "Stalls", "stall"),
        ("read_bytes", "Read", "bytes"),
    )
    for key, label, kind in kinds:
        for letter, run in zip("AB", of, strict=True):
            columns.append(
                _column(f"{key}{letter}", f"{label}, {letter}", kind, f"in run {letter}")
            )
            rows[f"{key}{letter}"] = [run.get(n, {}).get(key, 0) for n in names]
    return {"columns": columns, "rows": rows, "sort": "stall_sA"}


# -- the file -----------------------------------------------------------------------------------


def _page(template: str, context: dict[str, Any], page: dict[str, Any], charts: Charts) -> str:
    from bokeh.resources import Resources
    from markupsafe import Markup

    from offload.report_view import CAUSES

    ours = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in OUR_SCRIPTS)
    library = "\n".join(Resources(mode="inline", components=["bokeh"], minified=True).js_raw)
    scripts = [library, f'"use strict";\n(() => {{\n{ours}\n}})();']
    return _environment().get_template(template).render(
        **context,
        page=page | {"causes": CAUSES, "charts": charts.to_dict()},
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
    )  # fmt: skip


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # In Bokeh's document what is referred to must come first.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    return environment


def _policy(scripts: list[str]) -> str:
    """Nothing is loaded, and no other script than these runs."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    ]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
