"""One recorded step as the report shows it: lanes, stalls, phases and memory, from its start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from offload.parts import Parts
from offload.prefetch.trace import Phase
from offload.report_memory import Columns, device_columns, disk_columns, host_columns
from offload.report_tables import Tables
from offload.tape import Tape
from offload.tiers.lane import Span
from offload.timeline import ENGINE, Levels, Segment, segments, union

MOST_SPANS = 20_000  # of all lanes and the stalls; more are joined where they are shortest
COMPUTING = ("compute", "update")
TRANSFERS = ("h2d", "d2h", "read", "write")


@dataclass(slots=True)
class Row:
    """One span of a lane. ``label``: the cause of a stall."""

    start_s: float
    end_s: float
    chunk: int = -1
    size_bytes: int = 0
    module: int = -1
    label: str = ""


@dataclass(slots=True)
class LaneRows:
    """A lane's spans in order; bytes and busy seconds are those before any are joined."""

    rows: list[Row] = field(default_factory=list)

    @property
    def moved_bytes(self) -> int:
        return sum(row.size_bytes for row in self.rows)

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one of them was under way."""
        return sum(end_s - start_s for start_s, end_s in self._union())

    def _union(self) -> list[tuple[float, float]]:
        return union((row.start_s, row.end_s) for row in self.rows)


@dataclass(slots=True)
class Step:
    """A recorded step, seconds from its start."""

    step_s: float
    lanes: dict[str, LaneRows]
    stalls: LaneRows
    phases: list[dict[str, Any]]
    memory: dict[str, Columns]
    moved: frozenset[int]  # chunks that were read or written

    def stall_s(self, *, waiting_only: bool = False) -> float:
        """Seconds in which the loop did not compute; or those in which it waited for bytes."""
        rows = (r for r in self.stalls.rows if not (waiting_only and r.label == ENGINE))
        return sum(row.end_s - row.start_s for row in rows)

    def per_module(self, tables: Tables) -> Mapping[str, Mapping[int, float]]:
        """Seconds and bytes of each module."""
        found: defaultdict[str, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
        for name in COMPUTING:
            for row in self.lanes[name].rows:
                found["compute_s"][row.module] += row.end_s - row.start_s
        for row in self.stalls.rows:
            found["stall_s"][row.module] += row.end_s - row.start_s
        for lane in ("read", "write"):
            for row in self.lanes[lane].rows:
                for module, share_bytes in tables.split(row.chunk, row.size_bytes):
                    found[f"{lane}_bytes"][module] += share_bytes
        return found

    def to_dict(self) -> dict[str, Any]:
        """The schema's ``step``, but for what the plan knows; ``notes`` say what was left out."""
        lanes = {name: lane for name, lane in self.lanes.items() if lane.rows}
        busy = {name: (lane.moved_bytes, lane.busy_s) for name, lane in lanes.items()}
        all_rows = {name: lane.rows for name, lane in lanes.items()} | {"stalls": self.stalls.rows}
        joined, resolution_s = join_short(all_rows, self.step_s)
        notes = []
        if resolution_s:
            count = sum(map(len, all_rows.values()))
            notes.append(
                f"of {count:,} spans those shorter than {resolution_s * 1e3:.3g} ms are joined"
            )
        for tier, columns in self.memory.items():
            shown = columns.to_dict()
            if shown["samples"] > len(shown["t_s"]):
                notes.append(f"{tier}: {len(shown['t_s']):,} of {shown['samples']:,} samples")
        stalls = joined.pop("stalls")
        return {
            "step_s": round(self.step_s, 6),
            "phases": self.phases,
            "lanes": {
                name: {
                    "bytes": busy[name][0], "busy_s": round(busy[name][1], 6),
                    "spans": _columns(rows) | {"bytes": [r.size_bytes for r in rows]},
                }
                for name, rows in joined.items()
            },
            "stalls": _columns(stalls) | {"cause": [r.label for r in stalls]},
            "memory": {tier: columns.to_dict() for tier, columns in self.memory.items()},
            "notes": notes,
        }  # fmt: skip


def recorded_step(
    host: Tape, device: Tape | None, parts: Parts, tables: Tables, disk_bytes: int | None
) -> Step:
    """Work out what the tapes hold. ``disk_bytes``: the disk's budget."""
    whole = segments(_levels(host, device, parts), tables)
    began_s, step_s = host.began_s, host.ended_s - host.began_s
    lanes = {name: LaneRows() for name in (*COMPUTING, *TRANSFERS)}
    stalls = LaneRows()
    for s in whole:
        row = Row(s.start_s - began_s, s.end_s - began_s, s.chunk, 0, s.module, s.cause or "")
        (lanes[s.lane] if s.cause is None else stalls).rows.append(row)
    spans = {name: host.lanes.get(name, []) for name in ("read", "write", "d2h")}
    spans["h2d"] = device.lanes.get("read", []) if device is not None else []
    for name, found in spans.items():
        lanes[name].rows += _transfers(found, began_s, step_s, tables)
    memory = {"host": host_columns(host, parts, tables)}
    if device is not None:
        memory["device"] = device_columns(device, parts)
        memory["device"].hold_until(step_s)
    if parts.engine.space.disk is not None:
        memory["disk"] = disk_columns(host, parts, tables, disk_bytes)
    moved = frozenset(row.chunk for name in ("read", "write") for row in lanes[name].rows)
    return Step(step_s, lanes, stalls, _phases(whole, began_s), memory, moved)


def _levels(host: Tape, device: Tape | None, parts: Parts) -> Levels:
    if device is None or parts.device is None:
        return Levels(host)
    space = parts.device.engine.frames
    return Levels(host, device, [space.homes_of(c.id) for c in space.chunks])


def _transfers(
    spans: Iterable[Span], began_s: float, step_s: float, tables: Tables
) -> Iterable[Row]:
    """A transfer that began in the step before is shown from this step's start."""
    for chunk, start_s, end_s, size_bytes in sorted(spans, key=lambda span: span[1]):
        module = tables.chunks[chunk].module if chunk >= 0 else -1
        start, end = max(start_s - began_s, 0.0), min(max(end_s - began_s, 0.0), step_s)
        yield Row(min(start, end), end, chunk, size_bytes, module)


def _phases(whole: Sequence[Segment], began_s: float) -> list[dict[str, Any]]:
    """What is updated in a backward pass belongs to that."""
    phases: list[dict[str, Any]] = []
    for segment in whole:
        name = Phase.BACKWARD if segment.phase is Phase.EARLY else segment.phase
        if not phases or phases[-1]["name"] != name.value:
            start_s = round(segment.start_s - began_s, 6)
            phases.append({"name": name.value, "start_s": start_s, "end_s": start_s})
        phases[-1]["end_s"] = round(segment.end_s - began_s, 6)
    return phases


def join_short(
    lanes: dict[str, list[Row]], step_s: float, most: int = MOST_SPANS
) -> tuple[dict[str, list[Row]], float]:
    """The same with so many rows at most: neighbours are joined where they are shorter than the
    resolution that is returned; 0: nothing was joined.
    """
    resolution_s, joined = 0.0, lanes
    while sum(map(len, joined.values())) > most:
        resolution_s = 2 * resolution_s or step_s / (4 * most)
        joined = {name: _join(rows, resolution_s) for name, rows in lanes.items()}
    return joined, resolution_s


def _join(rows: list[Row], resolution_s: float) -> list[Row]:
    found: list[Row] = []
    for row in rows:
        last = found[-1] if found else None
        if last is not None and row.end_s - last.start_s < resolution_s:
            found[-1] = Row(
                last.start_s, max(last.end_s, row.end_s),
                last.chunk if last.chunk == row.chunk else -1, last.size_bytes + row.size_bytes,
                last.module if last.module == row.module else -1,
                last.label if last.label == row.label else "several",
            )  # fmt: skip
        else:
            found.append(row)
    return found


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {
        "start_s": [round(row.start_s, 6) for row in rows],
        "end_s": [round(row.end_s, 6) for row in rows],
        "chunk": [row.chunk for row in rows],
        "module": [row.module for row in rows],
    }
