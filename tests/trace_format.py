"""The Trace Event Format, as Google's document of that name has it, and what Perfetto makes of it.

Perfetto's own importer is stricter than the document where a track's slices do not nest: it drops
or misplaces their ends. So that is checked too. (Its trace processor comes as a binary that is
fetched when it is first used; it is not needed here.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

Event = dict[str, Any]
REAL = (int, float)

NAMES = {  # of metadata: what their only argument is
    "process_name": ("name", str), "process_labels": ("labels", str), "thread_name": ("name", str),
    "process_sort_index": ("sort_index", int), "thread_sort_index": ("sort_index", int),
}  # fmt: skip
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "X": {"name": str, "cat": str, "ts": REAL, "dur": REAL, "pid": int, "tid": int},
    "C": {"name": str, "ts": REAL, "pid": int, "args": dict},
    "M": {"name": str, "pid": int, "tid": int, "args": dict},
}
OPTIONAL = {"X": {"args", "cname", "id"}, "C": {"cat", "id", "tid"}, "M": {"cat", "ts"}}


def faults(trace: Any) -> list[str]:
    """What is wrong with a trace in its JSON object form; nothing, if viewers take all of it."""
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        return ["no object with a list of traceEvents"]
    found = []
    if trace.get("displayTimeUnit", "ms") not in ("ms", "ns"):
        found.append("displayTimeUnit")
    if not isinstance(trace.get("otherData", {}), dict):
        found.append("otherData")
    events = trace["traceEvents"]
    for number, event in enumerate(events):
        found += [f"event {number}: {fault}" for fault in _fields(event)]
    if not found:
        found += [*_tracks(events), *_counters(events), *_names(events)]
    return found


def _fields(event: Any) -> Iterable[str]:
    if not isinstance(event, dict) or event.get("ph") not in FIELDS:
        yield "no phase that is used here"
        return
    wanted = FIELDS[event["ph"]]
    for name, kind in wanted.items():
        value = event.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            yield f"{name} is {value!r}"
    if unknown := event.keys() - wanted.keys() - OPTIONAL[event["ph"]] - {"ph"}:
        yield f"unknown fields {sorted(unknown)}"
    if any(isinstance(v := event.get(name), REAL) and not 0 <= v < 1e15 for name in ("ts", "dur")):
        yield "a time below zero, or none"
    if not event.get("name"):
        yield "an empty name"
    args = event.get("args", {})
    if event["ph"] == "X" and not isinstance(args, dict):
        yield "args"
    elif event["ph"] == "C" and not all(isinstance(v, REAL) for v in args.values() or [None]):
        yield "a counter without numbers"
    elif event["ph"] == "M":
        key, kind = NAMES.get(event["name"], ("", object))
        if set(args) != {key} or not isinstance(args[key], kind):
            yield f"metadata {event['name']} with {args}"


def _tracks(events: list[Event]) -> Iterable[str]:
    """Slices of one thread come in order and each ends within the one that it began in."""
    tracks: defaultdict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["pid"], event["tid"]].append(event)
    for track, slices in tracks.items():
        if [e["ts"] for e in slices] != sorted(e["ts"] for e in slices):
            yield f"{track}: not in order"
        open_until: list[int] = []
        for event in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):
            start = round(event["ts"] * 1000)  # whole nanoseconds, as Perfetto counts
            while open_until and open_until[-1] <= start:
                open_until.pop()
            end = start + round(event["dur"] * 1000)
            if open_until and end > open_until[-1]:
                yield f"{track}: {event['name']} at {event['ts']} overlaps the end of another"
            open_until.append(end)


def _counters(events: list[Event]) -> Iterable[str]:
    """Each counter of a process has the same series throughout, in order of time."""
    found: dict[tuple[int, str, Any], tuple[float, set[str]]] = {}
    for event in (e for e in events if e["ph"] == "C"):
        which = event["pid"], event["name"], event.get("id")
        before_ts, series = found.get(which, (0.0, set(event["args"])))
        if event["ts"] < before_ts:
            yield f"counter {which}: not in order at {event['ts']}"
        if set(event["args"]) != series:
            yield f"counter {which}: other series at {event['ts']}"
        found[which] = event["ts"], series


def _names(events: list[Event]) -> Iterable[str]:
    """Every process and every thread with slices is named, once."""
    named = [(e["name"], e["pid"], e["tid"] if e["name"].startswith("thread") else None)
             for e in events if e["ph"] == "M"]  # fmt: skip
    if len(named) != len(set(named)):
        yield "named twice"
    for event in (e for e in events if e["ph"] != "M"):
        if ("process_name", event["pid"], None) not in named:
            yield f"process {event['pid']} has no name"
        if event["ph"] == "X" and ("thread_name", event["pid"], event["tid"]) not in named:
            yield f"thread {event['tid']} has no name"
