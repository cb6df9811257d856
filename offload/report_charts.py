"""The report's charts, as one Bokeh document: what is drawn where.

Colours, hover and zoom buttons belong to the page (report_page/charts.js), which finds charts and
renderers by their names: ``kind:weights``, ``stall``, ``budget`` and so on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.core.properties import value
from bokeh.document import Document
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    FixedTicker,
    Label,
    PanTool,
    Range1d,
    Span,
    WheelZoomTool,
)
from bokeh.plotting import figure
from numpy.typing import NDArray

from offload.tiers.spec import GIB, KIB, MIB, format_size

KINDS = ("weights", "gradients", "optimizer", "activations", "kv", "staging", "fixed")
COMPUTING = ("compute", "update")
OTHER = "other"  # the colour of spans that belong to no single chunk
LANES = ("compute", "update", "h2d", "d2h", "read", "write")
LANE_LABELS = {"h2d": "to GPU", "d2h": "from GPU"}
FONT = "system-ui, sans-serif"
LANE_HEIGHT_PX = 30
MOST_SAMPLES = 3000
MOST_DOTS = 100  # more steps are a line without dots
OFF_SCALE = 1.6  # a budget further above the peak than this is named, not drawn


class Charts:
    """The figures of one page. Each goes into the element whose id is ``chart-NAME``."""

    def __init__(self) -> None:
        self._document = Document()
        self._elements: dict[str, str] = {}
        self._ranges: dict[str, Range1d] = {}

    def shared(self, name: str, end_s: float) -> Range1d:
        """The clock of that name, made when first asked for: zooming one chart zooms all on it."""
        if name not in self._ranges:
            self._ranges[name] = Range1d(
                0, end_s, bounds=(0, end_s), min_interval=end_s * 1e-5, name=name
            )
        return self._ranges[name]

    def add(self, name: str, plot: figure) -> None:
        """One more figure."""
        plot.name = name
        self._document.add_root(plot)
        self._elements[plot.id] = f"chart-{name}"

    def to_dict(self) -> dict[str, Any]:
        """What ``Bokeh.embed.embed_items`` takes, as plain JSON."""
        return {"document": self._document.to_json(deferred=False), "elements": self._elements}


def _blank(height_px: int, x_range: Range1d, y_range: Range1d) -> figure:
    """A figure with a transparent ground, zoomed along time only."""
    tools = [
        BoxZoomTool(dimensions="width"),
        WheelZoomTool(dimensions="width", modifiers={"ctrl": True}),
        PanTool(dimensions="width"),
    ]
    plot = figure(
        height=height_px, x_range=x_range, y_range=y_range, tools=tools, toolbar_location=None,
        sizing_mode="stretch_width", min_border_left=70, min_border_right=14, min_border_top=4,
        min_border_bottom=26, background_fill_alpha=0, border_fill_alpha=0, outline_line_alpha=0,
    )  # fmt: skip
    plot.toolbar.active_drag = tools[0]
    plot.toolbar.active_scroll = tools[1]
    plot.xgrid.visible = False
    for axis in plot.axis:
        axis.axis_line_alpha = 0
        axis.minor_tick_line_alpha = 0
        axis.major_tick_line_alpha = 0
        axis.major_label_text_font = FONT
        axis.major_label_text_font_size = "11px"
    return plot


def _note(x: float, y: float, text: str, name: str, *, left: bool) -> Label:
    """A few words beside a point, on its left or on its right."""
    return Label(
        x=x, y=y, text=text, name=name, text_align="right" if left else "left",
        x_offset=-5 if left else 5, text_baseline="top", text_font=FONT,
        text_font_size="11px",
    )  # fmt: skip


# -- memory ---------------------------------------------------------------------------------


def kinds_of(memory: dict[str, Any]) -> list[str]:
    """The kinds that a tier ever held, in the order in which they are stacked."""
    return [kind for kind in KINDS if any(memory["kinds"].get(kind, ()))]


def used_bytes_of(memory: dict[str, Any]) -> NDArray[np.float64]:
    """What a tier held at each of its samples."""
    return np.asarray(memory["used_bytes"], dtype=np.float64)


def memory_top_bytes(memory: dict[str, Any]) -> float:
    """How far the chart of a tier reaches up: over its peak, and its budget if that is near."""
    peak_bytes = float(used_bytes_of(memory).max(initial=1.0))
    budget_bytes = memory.get("budget_bytes") or 0
    reach = max(peak_bytes, budget_bytes) if budget_bytes < OFF_SCALE * peak_bytes else peak_bytes
    return reach * 1.2


def _thinned(used: NDArray[np.float64]) -> NDArray[np.intp]:
    """Samples to draw: all, or the highest and the lowest of each of many short stretches."""
    if len(used) <= MOST_SAMPLES:
        return np.arange(len(used))
    keep = {0, len(used) - 1}
    for part in np.array_split(np.arange(len(used)), MOST_SAMPLES // 2):
        keep |= {int(part[used[part].argmax()]), int(part[used[part].argmin()])}
    return np.array(sorted(keep), dtype=np.intp)


def memory_chart(
    memory: dict[str, Any], step: dict[str, Any], x_range: Range1d, top_bytes: float
) -> figure:
    """One tier over a step: its kinds stacked, the budget as a line, the peak marked."""
    unit, unit_bytes = next(
        ((u, b) for u, b in (("GiB", GIB), ("MiB", MIB)) if top_bytes >= b), ("KiB", KIB)
    )
    plot = _blank(190, x_range, Range1d(0, top_bytes / unit_bytes))
    kinds = kinds_of(memory)
    used = used_bytes_of(memory)
    at = _thinned(used)
    times = np.asarray(memory["t_s"], dtype=np.float64)[at]
    source = ColumnDataSource({"t": np.append(times, max(step["step_s"], times[-1]))})
    top = np.zeros(len(at) + 1)
    source.data["top-"] = top.astype(np.float32)
    below = "top-"
    for kind in kinds:
        values = np.asarray(memory["kinds"][kind], dtype=np.float64)[at] / unit_bytes
        top = top + np.append(values, values[-1:])
        source.data[f"top-{kind}"] = top.astype(np.float32)
        plot.varea_step(
            x="t", y1=below, y2=f"top-{kind}", step_mode="after", source=source, name=f"kind:{kind}"
        )
        below = f"top-{kind}"
    _mark_phases(plot, step["phases"])
    _mark_peak(plot, memory, times_end_s=x_range.end, unit_bytes=unit_bytes)
    plot.tags = [{"type": "memory", "kinds": kinds, "unit_bytes": unit_bytes}]
    plot.yaxis.axis_label = unit
    plot.yaxis.ticker.desired_num_ticks = 4
    return plot


def _mark_phases(plot: figure, phases: list[dict[str, Any]]) -> None:
    for phase in phases[1:]:
        plot.add_layout(
            Span(location=phase["start_s"], dimension="height", name="phase-edge", line_width=1)
        )


def _mark_peak(
    plot: figure, memory: dict[str, Any], *, times_end_s: float, unit_bytes: int
) -> None:
    used = used_bytes_of(memory)
    peak = int(used.argmax())
    t_s, peak_bytes, top = memory["t_s"][peak], float(used[peak]), float(plot.y_range.end)
    late = t_s > times_end_s / 2
    plot.segment(x0=[t_s], y0=[0], x1=[t_s], y1=[top], name="peak-line", line_width=1.5)
    plot.scatter(x=[t_s], y=[peak_bytes / unit_bytes], size=8, name="peak-dot")
    plot.add_layout(_note(t_s, top, f"peak {format_size(peak_bytes)}", "peak-label", left=late))
    budget_bytes = memory.get("budget_bytes")
    if not budget_bytes:
        return
    text = f"budget {format_size(budget_bytes)}"
    if budget_bytes / unit_bytes < top:
        line = Span(location=budget_bytes / unit_bytes, dimension="width", name="budget")
        line.update(line_dash="dashed", line_width=1.5)
        plot.add_layout(line)
    else:
        text += ", above this chart"
    plot.add_layout(_note(0 if late else times_end_s, top, text, "budget-label", left=not late))


# -- lanes ----------------------------------------------------------------------------------


def lanes_of(step: dict[str, Any]) -> list[str]:
    """The lanes that did anything, from top to bottom."""
    return [lane for lane in LANES if step["lanes"].get(lane, {}).get("spans", {}).get("chunk")]


def lanes_chart(step: dict[str, Any], chunk_kinds: list[str], x_range: Range1d) -> figure:
    """What each lane did when: spans coloured by what they moved, and the waiting of compute."""
    lanes = lanes_of(step)
    rows = len(lanes) + 1  # the phases stand above
    plot = _blank(LANE_HEIGHT_PX * rows + 40, x_range, Range1d(0, rows))
    _draw_phases(plot, step, rows - 0.5)
    # Stalls are red where compute would be, and faintly behind the lanes that were waited for.
    stalls = _stall_source(step["stalls"])
    plot.quad(
        left="left", right="right", bottom=0, top=len(lanes), source=stalls, name="stall-band"
    )
    for kind, columns in _spans_by_kind(step, lanes, chunk_kinds).items():
        plot.hbar(
            y="y", left="left", right="right", height=0.66, source=ColumnDataSource(columns),
            name=f"kind:{kind}",
        )  # fmt: skip
    plot.hbar(
        y=len(lanes) - 0.5, left="left", right="right", height=0.66, source=stalls, name="stall"
    )
    plot.yaxis.ticker = FixedTicker(ticks=[_row(lanes, lane) for lane in lanes])
    plot.yaxis.major_label_overrides = {
        _row(lanes, lane): LANE_LABELS.get(lane, lane) for lane in lanes
    }
    plot.ygrid.visible = False
    plot.xaxis.axis_label = "seconds since the step began"
    plot.min_border_bottom = 44
    plot.tags = [{"type": "lanes", "lanes": lanes}]
    return plot


def _row(lanes: list[str], lane: str) -> float:
    return len(lanes) - lanes.index(lane) - 0.5


def _draw_phases(plot: figure, step: dict[str, Any], y: float) -> None:
    phases = step["phases"]
    names = [phase["name"] for phase in phases]
    start_s = [phase["start_s"] for phase in phases]
    end_s = [phase["end_s"] for phase in phases]
    _mark_phases(plot, phases)
    data = {"left": start_s, "right": end_s, "name": names}
    plot.hbar(
        y=y, left="left", right="right", height=0.66, source=ColumnDataSource(data), name="phase"
    )
    # Where each name stands and whether there is room for it depends on the zoom: the page decides.
    shown = ColumnDataSource({"x": [], "text": []})
    plot.text(
        x="x", y=y, text="text", source=shown, text_align="center", text_baseline="middle",
        text_font=value(FONT), text_font_size="11px", name="phase-label",
    )  # fmt: skip


def _stall_source(stalls: dict[str, Any]) -> ColumnDataSource:
    return ColumnDataSource({
        "left": np.asarray(stalls["start_s"], dtype=np.float64),
        "right": np.asarray(stalls["end_s"], dtype=np.float64),
        "index": np.arange(len(stalls["chunk"]), dtype=np.int32),
    })  # fmt: skip


def _spans_by_kind(
    step: dict[str, Any], lanes: list[str], chunk_kinds: list[str]
) -> dict[str, dict[str, Any]]:
    """The spans of all lanes in one table for each colour."""
    kinds = np.array([*chunk_kinds, OTHER], dtype=object)  # -1, no chunk, is the last
    gathered: dict[str, list[dict[str, Any]]] = {}
    for lane in lanes:
        spans = {k: np.asarray(v) for k, v in step["lanes"][lane]["spans"].items()}
        colours = (
            np.full(len(spans["chunk"]), lane, dtype=object)
            if lane in COMPUTING
            else kinds[spans["chunk"]]
        )
        for colour in sorted(set(colours)):
            mine = colours == colour
            part = {
                "left": spans["start_s"][mine].astype(np.float64),
                "right": spans["end_s"][mine].astype(np.float64),
                "chunk": spans["chunk"][mine].astype(np.int32),
                "bytes": spans["bytes"][mine].astype(np.float64),
                "module": spans["module"][mine].astype(np.int32),
            }
            part["y"] = np.full(len(part["left"]), _row(lanes, lane), dtype=np.float32)
            gathered.setdefault(colour, []).append(part)
    return {
        colour: {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for colour, parts in gathered.items()
    }


# -- the run --------------------------------------------------------------------------------


Series = dict[str, tuple[list[int], list[float | None]]]


def history_chart(series: Series, label: str, *, from_zero: bool) -> figure | None:
    """One number over the steps of a run, or of several; None where nothing is known.

    ``series``: for each run its steps and the values, None where a value is not known.
    """
    known = [v for _, values in series.values() for v in values if v is not None]
    if not known:
        return None
    low, high = min(known), max(known)
    room = (high - low or abs(high) or 1.0) * 0.08
    first = min(steps[0] for steps, _ in series.values() if steps)
    last = max(first + 1, *(steps[-1] for steps, _ in series.values() if steps))
    plot = _blank(
        200,
        Range1d(first, last, bounds=(first, last)),
        Range1d(0 if from_zero else low - room, high + room),
    )
    for name, (steps, values) in series.items():
        y = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
        kept = _thinned(np.nan_to_num(y))
        kept = kept[~np.isnan(y[kept])]
        source = ColumnDataSource({"x": np.asarray(steps, dtype=np.float64)[kept], "y": y[kept]})
        # Two runs often have the very same losses: the second is dashed, so both are seen.
        dash = "dashed" if plot.renderers else "solid"
        plot.line(x="x", y="y", source=source, line_width=1.75, line_dash=dash, name=f"line:{name}")
        if len(kept) <= MOST_DOTS and len(series) == 1:
            plot.scatter(x="x", y="y", source=source, size=4, name=f"line:{name}")
    plot.tags = [{"type": "history", "label": label}]
    plot.yaxis.ticker.desired_num_ticks = 4
    plot.xaxis.ticker.min_interval = 1
    plot.xaxis.axis_label = "step"
    plot.min_border_bottom = 44
    return plot
