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
    rows = {name: step["lanes"][name]["spans"] for name in step["lanes"]}
    rows["stalls"] = step["stalls"]
    for thread, lane in enumerate(ORDER):
        if lane != "phases" and lane not in rows:
            continue
        yield _name("thread_name", LANES, thread, lane)
        yield {
            "ph": "M", "name": "thread_sort_index", "pid": LANES, "tid": thread,
            "args": {"sort_index": thread},
        }  # fmt: skip
        if lane == "phases":
            yield from _phases(step, thread)
        else:
            yield from _spans(lane, thread, rows[lane], modules)
    for tier, memory in step["memory"].items():
        yield from _counters(tier, memory)


def _name(what: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _phases(step: dict[str, Any], thread: int) -> Iterator[Event]:
    for phase in step["phases"]:
        yield _complete(phase["name"], "phase", thread, phase["start_s"], phase["end_s"])


def _spans(
    lane: str, thread: int, spans: dict[str, list[Any]], modules: list[str]
) -> Iterator[Event]:
    for i, start_s in enumerate(spans["start_s"]):
        chunk, module = spans["chunk"][i], spans["module"][i]
        whose = modules[module] if module >= 0 else ""
        label = spans["cause"][i] if "cause" in spans else whose or lane
        event = _complete(label, lane, thread, start_s, spans["end_s"][i])
        event["args"] = {"module": whose, "chunk": chunk}
        if "bytes" in spans and spans["bytes"][i]:
            event["args"]["bytes"] = spans["bytes"][i]
        yield event


def _complete(name: str, category: str, thread: int, start_s: float, end_s: float) -> Event:
    return {
        "ph": "X", "name": name, "cat": category, "pid": LANES, "tid": thread,
        "ts": round(start_s * 1e6, 3), "dur": round((end_s - start_s) * 1e6, 3),
    }  # fmt: skip


def _counters(tier: str, memory: dict[str, Any]) -> Iterator[Event]:
    kinds = {kind: column for kind, column in memory["kinds"].items() if any(column)}
    for i, at_s in enumerate(memory["t_s"]):
        yield {
            "ph": "C", "name": f"{tier} bytes", "pid": MEMORY, "tid": 0,
            "ts": round(at_s * 1e6, 3), "args": {kind: kinds[kind][i] for kind in kinds},
        }  # fmt: skip
