"""In words: what binds, how far the step is from its bound, and what would help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from offload.coding import coding_s_per_byte
from offload.prefetch.bounds import Limit
from offload.prefetch.plan import Forecast
from offload.prefetch.trace import Moment
from offload.prefetch.variants import (
    WORTH_SHARE,
    Saving,
    Situation,
    less_memory,
    more_memory,
    with_chunks,
    with_costs,
    with_work,
    without_chunks,
)
from offload.report_tables import GRADIENTS, OPTIMIZER, Tables
from offload.tiers.spec import format_size

FAR = 1.3  # times the bound, from where on the reasons are named


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a run when it is judged. ``now``: its trace; None: it is not planned.

    ``ways``: what of the update's ways could still be asked for. ``aboard``: what device memory
    would save in which every weight lived. ``unsaid``: what malloc would be told
    by the ``offload`` command (offload/entry.py), by the variable's name.
    """

    step_s: float | None
    forecast: Forecast | None
    limit: Limit | None  # of all levels together
    stalls_s: dict[str, float]  # by cause, of the recorded step
    now: Situation | None
    ways: Ways
    framed: bool = False  # weights are copied to be computed with
    aboard: Saving | None = None
    unsaid: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ways:
    """What could be chosen otherwise. ``coding_s_per_byte``: of state in bf16."""

    trains: bool = False
    may_update_early: bool = False  # step_in_backward is not on, and could be
    may_narrow: bool = False  # state is as wide as the optimizer keeps it
    chunks: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by kind
    coding_s_per_byte: float = 0.0


def verdict(facts: Facts) -> dict[str, Any]:
    """The schema's ``verdict``."""
    binding, bound_s = "compute", None
    if facts.limit is not None:
        binding, bound_s = facts.limit.binding, facts.limit.bound_s
    ratio = facts.step_s / bound_s if facts.step_s and bound_s else None
    return {
        "text": _text(facts, binding, bound_s, ratio),
        "binding": binding,
        "ratio": round(ratio, 3) if ratio is not None else None,
        "advice": _advice(facts, binding, ratio),
    }


def ways_of(kind_trains: bool, early: bool, clips: bool, narrow: bool, tables: Tables) -> Ways:
    """From what a run was asked for."""
    chunks = {
        kind: tuple(c for c, row in enumerate(tables.chunks) if row.kind == kind)
        for kind in (GRADIENTS, OPTIMIZER)
    }
    free = kind_trains and not early and not clips
    may_narrow = kind_trains and not narrow
    coding_s = coding_s_per_byte("bf16") if may_narrow else 0.0
    return Ways(kind_trains, free, may_narrow, chunks, coding_s)


def _text(facts: Facts, binding: str, bound_s: float | None, ratio: float | None) -> str:
    if facts.step_s is None:
        return "no step has followed a plan yet: the first one is watched, report after the third"
    forecast = facts.forecast
    if bound_s is None or ratio is None:
        return f"nothing is planned, a step takes {facts.step_s:.3g} s"
    if forecast is not None and not forecast.moved_bytes and not facts.framed:
        return f"all fits in memory, nothing is moved: a step takes {facts.step_s:.3g} s"
    waits_s = sum(facts.stalls_s.values())
    return (
        f"{binding} binds: a step takes {facts.step_s:.3g} s, {ratio:.2f} x its bound of "
        f"{bound_s:.3g} s; it waits {waits_s:.3g} s of that"
    )


def _advice(facts: Facts, binding: str, ratio: float | None) -> list[str]:
    """What to change, cheapest first."""
    found: list[str] = []
    planned = facts.now is not None and facts.forecast is not None
    if facts.now is not None and facts.forecast is not None:
        found += _of_the_host(facts, facts.now, facts.forecast)
    aboard = facts.aboard
    if aboard is not None and aboard.saved_s > WORTH_SHARE * (aboard.step_s + aboard.saved_s):
        found.append(
            f"{format_size(aboard.change_bytes)} more device memory, in which every weight lived, "
            f"would save up to {aboard.saved_s:.2g} s a step"
        )
    if planned and ratio is not None and ratio > FAR and facts.stalls_s:
        cause = max(facts.stalls_s, key=lambda c: facts.stalls_s[c])
        found.append(
            f"the step is far from its bound; the largest part of what is missing is "
            f"{CAUSES.get(cause, cause)}, {facts.stalls_s[cause]:.3g} s"
        )
    return found


def _of_the_host(facts: Facts, now: Situation, forecast: Forecast) -> list[str]:
    """What concerns the host and its disk."""
    found: list[str] = []
    if forecast.moved_bytes:
        if facts.unsaid and not facts.framed:
            said = " ".join(f"{name}={value}" for name, value in facts.unsaid.items())
            found.append(f"start the process with {said} (docs/tuning.md, 9): the same numbers")
        found += _same_numbers(facts, now, forecast)
        found += _other_numbers(facts, now, forecast)
    gains = any("more host memory" in line for line in found)
    saving = None if gains else less_memory(now, forecast.step_s)
    if saving is not None and -saving.change_bytes > WORTH_SHARE * now.capacity_bytes:
        found.append(
            f"{format_size(-saving.change_bytes)} less host memory would cost nothing "
            f"(predicted {saving.step_s:.3g} s a step)"
        )
    return found


CAUSES = {
    "read": "waiting for reads from disk",
    "write": "waiting for writes to disk",
    "checksum": "comparing checksums before chunks leave (hooks of the user's may write to them)",
    "upload": "waiting for copies to the device",
    "download": "waiting for gradients to come from the device",
    "engine": "the runtime's own work (moving pages, making room): larger chunks would help",
}


def _same_numbers(facts: Facts, now: Situation, forecast: Forecast) -> list[str]:
    found, ways = [], facts.ways
    if ways.may_update_early:
        early = without_chunks(now, ways.chunks.get(GRADIENTS, ())).forecast()
        if early is not None and forecast.step_s - early.step_s > WORTH_SHARE * forecast.step_s:
            found.append(
                "step_in_backward=True: the same numbers, and gradients never go to disk; up to "
                f"{forecast.step_s - early.step_s:.2g} s a step less"
            )
    saving = more_memory(now, forecast.step_s)
    if saving is not None:
        found.append(
            f"{format_size(saving.change_bytes)} more host memory would save "
            f"{saving.saved_s:.2g} s a step"
        )
    return found


def _other_numbers(facts: Facts, now: Situation, forecast: Forecast) -> list[str]:
    found, ways = [], facts.ways
    if ways.trains:
        twice = with_work(now, 2.0, _is_pass).forecast()
        if twice is not None and twice.step_s < 1.75 * forecast.step_s:
            found.append(
                "twice the tokens a step (runtime.accumulate, or a larger batch) would take "
                f"{twice.step_s / forecast.step_s:.2f} x the time"
            )
    state = ways.chunks.get(OPTIMIZER, ())
    if ways.may_narrow and state:
        coded = with_costs(with_chunks(now, state, 0.5), state, ways.coding_s_per_byte)
        narrow = coded.forecast()
        if narrow is not None and forecast.step_s - narrow.step_s > WORTH_SHARE * forecast.step_s:
            found.append(
                'state_dtype="bf16" halves the optimizer state (other numbers): '
                f"{forecast.step_s - narrow.step_s:.2g} s a step less"
            )
    return found


def _is_pass(moment: Moment) -> bool:
    return not moment.phase.updates
