"""What the report says in words and tables: the data object turned into what the page prints.

Everything here is plain data; the page escapes it. Numbers get their units here and nowhere else.
"""

from __future__ import annotations

import math
from typing import Any

from offload.report_charts import COMPUTING, KINDS, OTHER, kinds_of, lanes_of, used_bytes_of
from offload.tiers.spec import GIB, format_size

MOST_STALLS = 10
TIER_NAMES = {"device": "GPU memory", "host": "Host memory", "disk": "Disk"}
TASKS = {"finetune": "fine-tuning", "train": "training", "generate": "generating"}
LANE_WORDS = {
    "compute": ("compute", "forward and backward passes"),
    "update": ("update", "the optimizer, chunk by chunk"),
    "h2d": ("to GPU", "host memory → GPU memory"),
    "d2h": ("from GPU", "GPU memory → host memory"),
    "read": ("read", "disk → host memory"),
    "write": ("write", "host memory → disk"),
}
CAUSES = {
    "read": "waiting for reads from disk",
    "write": "waiting for writes to disk",
    "upload": "waiting for copies to the GPU",
    "download": "waiting for gradients from the GPU",
    "checksum": "comparing checksums before chunks leave",
    "engine": "the runtime's own work",
}
LANE_RATES = {lane: f"{lane}_bytes_per_s" for lane in ("read", "write", "h2d", "d2h")}
FASTER = "faster than the rates measured before allow"
COMPARED = {
    "step_s": "Step time", "stall_s": "Waiting for bytes", "peak_bytes": "Most memory held",
    "read_bytes": "Read from disk", "write_bytes": "Written to disk",
}  # fmt: skip


# -- numbers for people -----------------------------------------------------------------------


def seconds(value_s: float) -> str:
    """A duration with three digits that matter."""
    if abs(value_s) >= 100:
        return f"{value_s:,.0f} s"
    if abs(value_s) >= 1:
        return f"{value_s:.2f} s"
    if abs(value_s) >= 1e-3:
        return f"{value_s * 1e3:.1f} ms"
    return f"{value_s * 1e6:.0f} µs" if value_s else "0 s"


def rate(bytes_per_s: float) -> str:
    """A bandwidth, always in GiB/s so that lanes compare."""
    return f"{bytes_per_s / GIB:.2f} GiB/s"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent."""
    if not whole:
        return "0%"
    percent = 100 * part / whole
    return f"{percent:.1f}%" if abs(percent) < 10 else f"{percent:.0f}%"


def count(value: float) -> str:
    """A number of parameters."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def quantity(key: str, value: float) -> str:
    """A value with the unit that its name says."""
    return seconds(value) if key.endswith("_s") else format_size(value)


def cause_words(cause: str) -> str:
    """Why nothing was computed, in words."""
    return CAUSES.get(cause, cause)


# -- the parts of the page ----------------------------------------------------------------------


def headline(data: dict[str, Any]) -> dict[str, Any]:
    """Who ran what, the verdict, its four figures and what to change."""
    model, verdict = data["model"], data["verdict"]
    about = (
        f"{count(model['parameters'])} parameters",
        TASKS.get(data["task"], data["task"]),
        f"{model['chunks']:,} chunks of {format_size(model['chunk_bytes'])}",
    )
    return {
        "model": model["name"],
        "about": " · ".join(about),
        "made": data["made"].replace("T", " ").replace("Z", " UTC"),
        "verdict": verdict["text"][:1].upper() + verdict["text"][1:],
        "advice": verdict["advice"],
        "figures": _figures(data),
    }


def _figures(data: dict[str, Any]) -> list[dict[str, Any]]:
    measured, step = data["measured"], data["step"] or {}
    step_s, stall_s = measured["step_s"], measured["stall_s"]
    if step:  # as its timeline shows them, the runtime's own work included
        stall_s = sum(step["stalls"]["end_s"]) - sum(step["stalls"]["start_s"])
        step_s = step["step_s"]
    bound_s, ratio = step.get("bound_s"), data["verdict"].get("ratio")
    figures = [
        {
            "label": "One step", "value": seconds(step_s),
            "note": f"the bound is {seconds(bound_s)}" if bound_s else "measured", "state": "",
        },
        {
            "label": "Against the bound", "value": f"{ratio:.2f}×" if ratio else "unknown",
            "note": "1.00× is the best possible here" if (ratio or 1) >= 1 else FASTER,
            "state": "accent",
        },
        {
            "label": "Stalls", "value": seconds(stall_s),
            "state": "bad" if stall_s > 0.02 * step_s else "",
            "note": f"{share(stall_s, step_s)} of the step computed nothing",
        },
    ]  # fmt: skip
    return [*figures, _fullest(data)]


def _fullest(data: dict[str, Any]) -> dict[str, Any]:
    """The tier nearest to its budget."""
    memory = (data["step"] or {}).get("memory", {})
    peaks = {
        tier: (float(used_bytes_of(m).max(initial=0)), m.get("budget_bytes"))
        for tier, m in memory.items()
    }
    if not peaks:
        peak_bytes = data["measured"]["peak_bytes"]
        peaks = {"host": (peak_bytes, data["budgets"]["host"])}
    tier = max(peaks, key=lambda t: peaks[t][0] / (peaks[t][1] or float("inf")))
    peak_bytes, budget_bytes = peaks[tier]
    note = f"of {format_size(budget_bytes)}" if budget_bytes else "no budget was set"
    if budget_bytes:
        where = TIER_NAMES.get(tier, tier).lower().replace("gpu", "GPU")
        note += f" {where} ({share(peak_bytes, budget_bytes)})"
    return {"label": "Peak memory", "value": format_size(peak_bytes), "note": note, "state": ""}


def step_parts(data: dict[str, Any]) -> dict[str, Any]:
    """Where the seconds of the step went, and where its bound lies."""
    step = data["step"]
    stalls, whole_s = step["stalls"], step["step_s"]
    waited: dict[str, float] = {}
    for cause, start_s, end_s in zip(
        stalls["cause"], stalls["start_s"], stalls["end_s"], strict=True
    ):
        waited[cause] = waited.get(cause, 0.0) + end_s - start_s
    parts = [
        {"kind": lane, "label": label, "s": step["lanes"].get(lane, {}).get("busy_s", 0.0)}
        for lane, label in (("compute", "computing"), ("update", "updating weights"))
    ]
    causes = sorted(waited, key=lambda cause: -waited[cause])
    parts += [{"kind": "stall", "label": cause_words(c), "s": waited[c]} for c in causes]
    rest_s = whole_s - sum(part["s"] for part in parts)
    if rest_s > 0.005 * whole_s:
        parts.append({"kind": "rest", "label": "everything else", "s": rest_s})
    stalls_seen = 0
    for part in parts:
        part |= {
            "percent": 100 * part["s"] / whole_s, "text": seconds(part["s"]),
            "share": share(part["s"], whole_s), "strength": 1.0,
        }  # fmt: skip
        if part["kind"] == "stall":
            part["strength"] = max(0.35, 1 - 0.22 * stalls_seen)  # shades of one red
            stalls_seen += 1
    bound_s = step["bound_s"]
    bound_percent = 0.0 if bound_s is None else min(100.0, 100 * bound_s / whole_s)
    return {
        "parts": [p for p in parts if p["s"] > 0], "bound_percent": bound_percent,
        "bound": "not known" if bound_s is None else seconds(bound_s), "step": seconds(whole_s),
    }  # fmt: skip


def tiers(data: dict[str, Any], prefix: str) -> list[dict[str, Any]]:
    """One entry for each tier with samples: its chart, and what was there at the peak."""
    step = data["step"]
    return [
        _tier(data, tier, step["memory"][tier], prefix)
        for tier in TIER_NAMES
        if tier in step["memory"]
    ]


def _tier(data: dict[str, Any], tier: str, memory: dict[str, Any], prefix: str) -> dict[str, Any]:
    used = used_bytes_of(memory)
    peak = int(used.argmax())
    at_s, peak_bytes, budget_bytes = (
        memory["t_s"][peak],
        float(used[peak]),
        memory.get("budget_bytes"),
    )
    kinds = [
        {
            "kind": kind, "text": format_size(memory["kinds"][kind][peak]),
            "share": share(memory["kinds"][kind][peak], peak_bytes),
        }
        for kind in kinds_of(memory)
    ]  # fmt: skip
    limit = "no budget was set"
    if budget_bytes:
        limit = f"{share(peak_bytes, budget_bytes)} of the budget of {format_size(budget_bytes)}"
    return {
        "name": TIER_NAMES[tier], "chart": f"{prefix}memory-{tier}", "kinds": kinds,
        "peak": format_size(peak_bytes), "limit": limit,
        "when": f"{seconds(at_s)} into the step, {_doing(data, at_s)}".rstrip(", "),
    }  # fmt: skip


def _doing(data: dict[str, Any], at_s: float) -> str:
    """The phase and the module at a moment of the step."""
    step, words = data["step"], ""
    for phase in step["phases"]:
        if phase["start_s"] <= at_s <= phase["end_s"]:
            words = f"in {phase['name']}"
    for lane in ("compute", "update"):
        spans = step["lanes"].get(lane, {}).get("spans")
        if not spans:
            continue
        inside = zip(spans["start_s"], spans["end_s"], spans["module"], strict=True)
        for start_s, end_s, module in inside:
            if start_s <= at_s <= end_s and module >= 0:
                return f"{words} of {data['modules'][module]['name']}"
    return words


def lane_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What each lane carried, how busy it was, and how near to its measured rate."""
    step, rates = data["step"], data["machine"]["rates"]
    rows = []
    for lane in lanes_of(step):
        values = step["lanes"][lane]
        label, what = LANE_WORDS[lane]
        row = {
            "lane": lane, "label": label, "what": what, "busy": seconds(values["busy_s"]),
            "share": share(values["busy_s"], step["step_s"]),
            "percent": min(100.0, 100 * values["busy_s"] / step["step_s"]),
            "bytes": "", "rate": "", "possible": "",
        }  # fmt: skip
        if values["bytes"]:
            reached = values["bytes"] / max(values["busy_s"], 1e-9)
            possible = rates.get(LANE_RATES.get(lane, ""), 0)
            row |= {"bytes": format_size(values["bytes"]), "rate": rate(reached)}
            row["possible"] = f"{share(reached, possible)} of {rate(possible)}" if possible else ""
        rows.append(row)
    return rows


def lane_kinds(data: dict[str, Any]) -> list[str]:
    """The kinds of chunks that any lane moved, in the order of the memory charts."""
    kinds = [*data["chunks"]["kind"], OTHER]  # the last is for no single chunk, -1
    lanes = (lane for name, lane in data["step"]["lanes"].items() if name not in COMPUTING)
    moved = {kinds[chunk] for lane in lanes for chunk in set(lane["spans"]["chunk"])}
    return [kind for kind in (*KINDS, OTHER) if kind in moved]


def longest_stalls(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The waits that cost most, longest first."""
    stalls, modules, chunks = data["step"]["stalls"], data["modules"], data["chunks"]
    took = [end - start for start, end in zip(stalls["start_s"], stalls["end_s"], strict=True)]
    rows = []
    for i in sorted(range(len(took)), key=lambda j: -took[j])[:MOST_STALLS]:
        module, chunk = stalls["module"][i], stalls["chunk"][i]
        names = chunks["tensors"][chunk] if chunk >= 0 else []
        more = len(names) - 2
        rows.append({
            "start_s": stalls["start_s"][i], "end_s": stalls["end_s"][i],
            "start": seconds(stalls["start_s"][i]), "took": seconds(took[i]),
            "module": modules[module]["name"] if module >= 0 else "",
            "cause": cause_words(stalls["cause"][i]), "chunk": chunk if chunk >= 0 else None,
            "tensors": ", ".join(names[:2]) + (f" and {more} more" if more > 0 else ""),
        })  # fmt: skip
    return rows


def forecast_rows(data: dict[str, Any]) -> list[dict[str, Any]]:
    """What the plan foretold beside what happened."""
    forecast, measured = data["forecast"], data["measured"]
    if not forecast:
        return []
    return [
        _pair(key, label, forecast[key], measured[key])
        for key, label in COMPARED.items()
        if forecast.get(key) is not None and measured.get(key) is not None
    ]


def _pair(key: str, label: str, before: float, after: float) -> dict[str, Any]:
    """Two values of one thing, each as a part of the larger, and how the second differs."""
    most = max(before, after) or 1.0
    change = (after - before) / before if before else math.inf if after else 0.0
    size = "equal" if abs(change) < 0.005 else f"{change:+.0%}".replace("-", "−")
    if change == math.inf:
        size = "more"
    return {
        "key": key, "label": label, "change": size, "far": abs(change) > 0.15,
        "before": quantity(key, before), "before_percent": 100 * before / most,
        "after": quantity(key, after), "after_percent": 100 * after / most,
    }  # fmt: skip


def machine_rows(data: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Budgets, hardware, measured rates and versions, by heading."""
    machine = data["machine"]
    budgets = {
        TIER_NAMES[tier]: format_size(size_bytes) if size_bytes else "not limited"
        for tier, size_bytes in data["budgets"].items()
        if tier != "device" or machine["device"]
    }
    hardware = {
        "Processor": f"{machine['cores']} cores",
        "Memory": format_size(machine["host_bytes"]),
        "GPU": machine["device"] or "none",
    }
    rates = {}
    for key, value in machine["rates"].items():
        if not isinstance(value, int | float) or not value:
            continue
        label = key.removesuffix("_bytes_per_s").removesuffix("_s").replace("_", " ")
        rates[label] = rate(value) if key.endswith("_bytes_per_s") else seconds(value)
    return {
        "Budgets": budgets, "Hardware": hardware, "Measured rates": rates,
        "Versions": dict(machine["versions"]),
    }  # fmt: skip


def two_runs(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """The measured values of two runs beside each other."""
    rows = [
        _pair(key, label, a["measured"][key], b["measured"][key])
        for key, label in COMPARED.items()
        if a["measured"].get(key) is not None and b["measured"].get(key) is not None
    ]
    if a["step"] and b["step"] and None not in (a["step"]["bound_s"], b["step"]["bound_s"]):
        rows.insert(
            1, _pair("bound_s", "Bound of a step", a["step"]["bound_s"], b["step"]["bound_s"])
        )
    return rows


def difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Which run is faster, in one line."""
    a_s, b_s = a["measured"]["step_s"], b["measured"]["step_s"]
    times = f"a step takes {seconds(a_s)} in A and {seconds(b_s)} in B"
    ratio = max(a_s, b_s) / max(min(a_s, b_s), 1e-12)
    if ratio < 1.02:
        return f"Both runs are equally fast: {times}."
    return f"{'B' if b_s < a_s else 'A'} is {ratio:.2f} times as fast: {times}."


def paired_tiers(a: dict[str, Any], b: dict[str, Any]) -> list[list[tuple[dict[str, Any], str]]]:
    """The tiers of two runs, those of one name together."""
    if not (a["step"] and b["step"]):
        return []
    both = [(tier, run["prefix"]) for run in (a, b) for tier in run["step"]["tiers"]]
    names = [name for name in TIER_NAMES.values() if any(t["name"] == name for t, _ in both)]
    return [[pair for pair in both if pair[0]["name"] == name] for name in names]
