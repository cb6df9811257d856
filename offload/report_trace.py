"""A report's data as trace events, for Perfetto (ui.perfetto.dev) and chrome://tracing.

The Trace Event Format's JSON: complete events ("X", microseconds), counters ("C") and names ("M").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Event = dict[str, Any]

LANES, MEMORY = 1, 2  # processes of the trace
ORDER = ("phases", "compute", "update", "stalls", "h2d", "d2h", "read", "write")  # top to bottom


def trace_events(data: dict[str, Any]) -> dict[str, Any]:
    """The trace of a report (docs/report-schema.md); without a recorded step it is empty."""
    step = data["step"]
    events: list[Event] = [] if step is None else list(_events(step, data))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {
            "offload": data["offload"], "made": data["made"], "verdict": data["verdict"]["text"],
        },
    }  # fmt: skip


def _events(step: dict[str, Any], data: dict[str, Any]) -> Iterator[Event]:
    modules = [module["name"] for module in data["modules"]]
    yield _name("process_name", LANES, 0, f"{data['model']['name']}: one step")
    yield _name("process_name", MEMORY, 0, "memory")
    rows: dict[str, dict[str, list[Any]]]
    rows = {name: step["lanes"][name]["spans"] for name in step["lanes"]}
    rows |= {"stalls": step["stalls"], "phases": _columns(step["phases"])}
    for number, lane in enumerate(ORDER):
        if lane not in rows:
            continue
        for again, track in enumerate(tracks(rows[lane])):
            thread = number + again * len(ORDER)
            yield _name("thread_name", LANES, thread, f"{lane} {again + 1}" if again else lane)
            yield {
                "ph": "M", "name": "thread_sort_index", "pid": LANES, "tid": thread,
                "args": {"sort_index": 1000 * number + again},
            }  # fmt: skip
            for i in track:
                yield _span(lane, thread, rows[lane], i, modules)
    for tier, memory in step["memory"].items():
        yield from _counters(tier, memory)


def _name(what: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def tracks(spans: dict[str, list[Any]]) -> list[list[int]]:
    """Indices of spans by track, in order: a lane's workers overlap, slices of one track must not.

    Viewers nest slices, and lose the end of one that outlasts the slice in which it began.
    """
    found: list[list[int]] = []
    ends: list[int] = []
    for i in sorted(range(len(spans["start_s"])), key=lambda i: _ns(spans["start_s"][i])):
        start = _ns(spans["start_s"][i])
        free = next((n for n, end in enumerate(ends) if end <= start), len(ends))
        if free == len(ends):
            found.append([])
            ends.append(0)
        found[free].append(i)
        ends[free] = _ns(spans["end_s"][i])
    return found


def _columns(phases: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [p[key] for p in phases] for key in ("name", "start_s", "end_s")}


def _span(lane: str, thread: int, spans: dict[str, list[Any]], i: int, modules: list[str]) -> Event:
    start, end = _ns(spans["start_s"][i]), _ns(spans["end_s"][i])
    event: Event = {
        "ph": "X", "name": lane, "cat": lane, "pid": LANES, "tid": thread,
        "ts": start / 1000, "dur": (end - start) / 1000,
    }  # fmt: skip
    if "name" in spans:
        return event | {"name": spans["name"][i], "cat": "phase"}
    whose = modules[spans["module"][i]] if spans["module"][i] >= 0 else ""
    event["name"] = spans["cause"][i] if "cause" in spans else whose or lane
    event["args"] = {"module": whose, "chunk": spans["chunk"][i]}
    if "bytes" in spans and spans["bytes"][i]:
        event["args"]["bytes"] = spans["bytes"][i]
    return event


def _ns(seconds: float) -> int:
    """Nanoseconds, in which viewers count: rounded once, so that neighbours do not overlap."""
    return round(seconds * 1e9)


def _counters(tier: str, memory: dict[str, Any]) -> Iterator[Event]:
    kinds = {kind: column for kind, column in memory["kinds"].items() if any(column)}
    for i, at_s in enumerate(memory["t_s"]):
        yield {
            "ph": "C", "name": f"{tier} bytes", "pid": MEMORY, "tid": 0,
            "ts": _ns(at_s) / 1000, "args": {kind: kinds[kind][i] for kind in kinds},
        }  # fmt: skip
