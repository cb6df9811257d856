"""``runtime.report(path)``: the last planned step, where memory and time went, and why.

The data is one JSON object, docs/report-schema.md; the page and the trace are made from it alone.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from offload import __version__
from offload.entry import unsaid
from offload.limits import limit_of, more_device_memory
from offload.prefetch.bounds import Limit
from offload.prefetch.variants import Situation
from offload.record import Follower
from offload.report_advice import Facts, verdict, ways_of
from offload.report_files import rendered, write_text
from offload.report_step import Step, recorded_step
from offload.report_tables import Tables
from offload.steps import Kind
from offload.tape import Tape
from offload.tiers.home import Backing
from offload.track import Track

if TYPE_CHECKING:
    from offload.run import Runtime

SCHEMA = 1
MOST_HISTORY = 5000  # steps; of more every other one is kept, and so on
FORECAST = ("step_s", "stall_s", "peak_bytes", "read_bytes", "write_bytes")
HISTORY = ("step", "loss", "step_s", "tokens_per_s")

History = Mapping[str, Sequence[float | None]]


def report_data(run: Runtime, task: str = "", history: History | None = None) -> dict[str, Any]:
    """The report's object. ``history``: columns of HISTORY, of a loop that knows its losses."""
    parts = run.parts
    kind = Kind.TRAIN if parts.steps.tracks[Kind.TRAIN].steps else Kind.INFER
    track, tables = parts.steps.tracks[kind], Tables(run.model, parts)
    step = _recorded(run, kind, track, tables)
    follower = track.tape.follower if track.tape is not None else track.follower
    forecast = follower.plan.forecast if follower is not None else None
    limit = limit_of(parts, kind)
    facts = Facts(
        step.step_s if step is not None else None, forecast, limit, _stalls(step),
        _situation(run, follower), _ways(run, kind, tables), framed=parts.device is not None,
        aboard=more_device_memory(parts, kind), unsaid=unsaid(os.environ),
    )  # fmt: skip
    homes = _homes(tables, step, run)
    return {
        "schema": SCHEMA,
        "offload": __version__,
        "made": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "task": task or ("train" if kind is Kind.TRAIN else "generate"),
        "machine": _machine(run),
        "model": _model(run, tables),
        "budgets": {
            "device": parts.device.engine.ledger.budget_bytes if parts.device else None,
            "host": parts.engine.ledger.budget_bytes,
            "disk": run.given.budget.disk_bytes,
        },
        "verdict": verdict(facts),
        "step": _step(step, limit),
        "chunks": tables.to_dict(homes),
        "modules": _modules(tables, homes, step),
        "forecast": {k: v for k, v in asdict(forecast).items() if k in FORECAST}
        if forecast is not None else None,
        "measured": _measured(step),
        "history": shortened(history or _own_history(track)),
    }  # fmt: skip


def write_report(
    run: Runtime, path: Path, task: str = "", history: History | None = None
) -> None:  # fmt: skip
    """See ``Runtime.report``."""
    write_text(path, rendered(report_data(run, task, history), path.name))


def shortened(history: History) -> dict[str, list[float | None]]:
    """All columns, of at most MOST_HISTORY steps."""
    count = len(history.get("step", ()))
    stride = max(-(-count // MOST_HISTORY), 1)
    return {
        key: list(history.get(key, [None] * count))[::stride] for key in HISTORY
    }  # fmt: skip


def _recorded(run: Runtime, kind: Kind, track: Track, tables: Tables) -> Step | None:
    tape, device = track.tape, None
    if tape is None:
        return None
    if run.parts.device is not None:
        device = _within(run.parts.device.steps.tracks[kind].tape, tape)
    return recorded_step(tape, device, run.parts, tables, run.given.budget.disk_bytes)


def _within(tape: Tape | None, whole: Tape) -> Tape | None:
    """The device's tape, if it is of the same step as the host's."""
    if tape is None or not whole.began_s <= tape.ended_s <= whole.ended_s:
        return None
    return tape


def _situation(run: Runtime, follower: Follower | None) -> Situation | None:
    machine = run.parts.machine
    if machine is None or follower is None:
        return None
    trace, capacity_bytes = follower.trace, run.parts.engine.ledger.capacity_bytes
    return Situation(trace, machine, capacity_bytes)


def _ways(run: Runtime, kind: Kind, tables: Tables) -> Any:
    stepper, device = run.parts.stepper, run.parts.device
    # Weights whose state is narrowed would not live on the device any more.
    aboard = device is not None and device.residents is not None and device.residents.bytes > 0
    return ways_of(
        kind is Kind.TRAIN and stepper is not None, run.parts.early is not None,
        stepper is not None and stepper.clips, aboard or run.state_dtype is not None, tables,
    )  # fmt: skip


def _stalls(step: Step | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in step.stalls.rows if step is not None else ():
        found[row.label] = found.get(row.label, 0.0) + row.end_s - row.start_s
    return found


def _homes(tables: Tables, step: Step | None, run: Runtime) -> list[str]:
    """Where each chunk is between its uses: on disk if it was moved, or is there now."""
    moved = step.moved if step is not None else frozenset()
    chunks = zip(run.parts.engine.space.chunks, tables.chunks, strict=True)
    return [
        "disk" if row.on_disk and (c.id in moved or c.backing is Backing.FILE) else "host"
        for c, row in chunks
    ]


def _machine(run: Runtime) -> dict[str, Any]:
    rates = run.parts.machine.to_dict() if run.parts.machine is not None else {}
    return {
        "cores": os.cpu_count(),
        "host_bytes": psutil.virtual_memory().total,
        "device": _device_name(run),
        "rates": rates,
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "offload": __version__,
        },
    }  # fmt: skip


def _device_name(run: Runtime) -> str | None:
    device = run.parts.device
    if device is None:
        return None
    if device.place.type == "cuda":
        return str(torch.cuda.get_device_name(device.place))
    own = run.given.place is not None and run.given.place.own_memory
    return "emulated" if own else "frames on the CPU"


def _model(run: Runtime, tables: Tables) -> dict[str, Any]:
    return {
        "name": type(run.model).__name__,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "chunks": len(tables.chunks),
        "chunk_bytes": max((row.size_bytes for row in tables.chunks), default=0),
    }


def _step(step: Step | None, limit: Limit | None) -> dict[str, Any] | None:
    if step is None:
        return None
    known = dict.fromkeys(Limit._fields) if limit is None else limit._asdict()
    return {**known, "binding": known["binding"] or "compute", **step.to_dict()}


def _modules(tables: Tables, homes: list[str], step: Step | None) -> list[dict[str, Any]]:
    spent = step.per_module(tables) if step is not None else {}
    held = tables.home_bytes(homes)

    def of(key: str, module: int) -> float:
        return spent.get(key, {}).get(module, 0)

    return [
        {
            "name": name, "bytes": tables.weight_bytes[i], "home_bytes": held.get(i, {}),
            "compute_s": round(of("compute_s", i), 6), "stall_s": round(of("stall_s", i), 6),
            "read_bytes": int(of("read_bytes", i)), "write_bytes": int(of("write_bytes", i)),
        }
        for i, name in enumerate(tables.modules)
    ]  # fmt: skip


def _measured(step: Step | None) -> dict[str, Any] | None:
    if step is None:
        return None
    return {
        "step_s": round(step.step_s, 6),
        "stall_s": round(step.stall_s(waiting_only=True), 6),
        "peak_bytes": step.memory["host"].peak_bytes,
        "read_bytes": step.lanes["read"].moved_bytes,
        "write_bytes": step.lanes["write"].moved_bytes,
    }


def _own_history(track: Track) -> dict[str, list[float | None]]:
    """Steps that followed a plan; of others only their number is known."""
    first = track.steps - len(track.replayed_s) + 1
    seconds = [round(s, 6) for s in track.replayed_s]
    return {"step": [first + i for i in range(len(seconds))], "step_s": list(seconds)}
