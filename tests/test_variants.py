"""What-if forecasts: in the right direction, and none where nothing is to be gained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload.prefetch.bounds import Limit
from offload.prefetch.plan import Forecast
from offload.prefetch.planner import smallest_bytes
from offload.prefetch.trace import Phase
from offload.prefetch.variants import (
    LONG_TRACE,
    Situation,
    less_memory,
    more_memory,
    with_chunks,
    with_costs,
    with_work,
    without_chunks,
)
from offload.report_advice import Facts, Ways, verdict
from offload.report_tables import GRADIENTS, OPTIMIZER
from offload.tiers.spec import MIB, Machine
from tests.test_planner import typical

DRIVE = Machine(1.9e9, 6.0e9, 1.35e9, 1.5e9, 1e10)
LAYERS = 8


def situation(share: float, compute_s: float = 1e-4) -> Situation:
    """A step of 32 chunks of 4 MiB in a share of what it would like."""
    trace = typical(LAYERS, 1, 4 * MIB, compute_s)
    now = Situation(trace, DRIVE, 0)
    return replace(now, capacity_bytes=int(now.whole_bytes * share))


def forecast(now: Situation) -> Forecast:
    found = now.forecast()
    assert found is not None
    return found


def facts(now: Situation, **ways: bool) -> Facts:
    predicted = forecast(now)
    kinds = {GRADIENTS: tuple(range(LAYERS, 2 * LAYERS)),
             OPTIMIZER: tuple(range(2 * LAYERS, 4 * LAYERS))}  # fmt: skip
    stalls = {"read": predicted.stall_s}
    ways_of = Ways(chunks=kinds, **ways)
    return Facts(1.1 * predicted.bound_s, predicted, predicted.limit, stalls, now, ways_of)


def test_what_the_environment_could_say_is_named_first_where_anything_moves() -> None:
    said = {"GLIBC_TUNABLES": "x"}
    asked = replace(facts(situation(0.4)), unsaid=said)
    first = verdict(asked)["advice"][0]
    assert "start the process with GLIBC_TUNABLES=x" in first
    for silent in (
        replace(asked, unsaid={}),
        replace(asked, framed=True),  # what a GPU computes waits for nobody's spinning
        replace(facts(situation(1.5)), unsaid=said),
    ):
        assert not any("start the process" in line for line in verdict(silent)["advice"])


def test_more_memory_saves_what_it_says() -> None:
    now = situation(0.4)
    step_s = forecast(now).step_s
    saving = more_memory(now, step_s)
    assert saving is not None
    then = forecast(replace(now, capacity_bytes=now.capacity_bytes + saving.change_bytes))
    assert then.step_s == saving.step_s
    assert saving.saved_s == pytest.approx(step_s - then.step_s)
    assert saving.saved_s > 0.05 * step_s


def test_memory_beyond_the_whole_is_spare() -> None:
    now = situation(1.5)
    step_s = forecast(now).step_s
    assert more_memory(now, step_s) is None
    saving = less_memory(now, step_s)
    assert saving is not None
    assert now.capacity_bytes + saving.change_bytes <= now.whole_bytes


def test_where_the_disk_is_no_matter_memory_can_go() -> None:
    now = situation(0.8, compute_s=1.0)
    saving = less_memory(now, forecast(now).step_s)
    assert saving is not None
    assert saving.change_bytes < 0
    left = now.capacity_bytes + saving.change_bytes
    assert left >= smallest_bytes(now.trace)
    assert more_memory(now, forecast(now).step_s) is None


def test_what_is_narrower_or_absent_moves_less() -> None:
    now = situation(0.4)
    before = forecast(now)
    state = range(2 * LAYERS, 4 * LAYERS)
    assert forecast(with_chunks(now, state, 0.5)).read_bytes < before.read_bytes
    assert forecast(without_chunks(now, range(LAYERS, 2 * LAYERS))).step_s < before.step_s
    dear = forecast(with_costs(now, state, 1e-3))
    assert dear.read_bytes == before.read_bytes
    coded = sum(now.trace.chunk_bytes[n.chunk] for m in now.trace.moments for n in m.needs
                if n.chunk in state)  # fmt: skip
    more_s = sum(m.compute_s for m in with_costs(now, state, 1e-3).trace.moments)
    assert more_s == pytest.approx(sum(m.compute_s for m in now.trace.moments) + 1e-3 * coded)
    twice = with_work(now, 2.0, lambda m: m.phase is Phase.FORWARD)
    assert sum(m.compute_s for m in twice.trace.moments) > sum(
        m.compute_s for m in now.trace.moments
    )


def test_a_budget_in_which_nothing_fits_gives_no_forecast() -> None:
    assert replace(situation(0.4), capacity_bytes=1).forecast() is None


def test_a_long_trace_is_planned_once() -> None:
    trace = typical(LONG_TRACE // 6, 1, 4096, 1e-6)
    now = Situation(trace, DRIVE, 0)
    now = replace(now, capacity_bytes=now.whole_bytes // 2)
    assert now.is_long
    saving = more_memory(now, forecast(now).step_s)
    assert saving is not None
    assert saving.change_bytes == now.whole_bytes - now.capacity_bytes


def test_the_verdict_says_what_binds_and_what_would_help() -> None:
    judged = verdict(facts(situation(0.4), trains=True, may_update_early=True, may_narrow=True))
    assert judged["binding"] == "disk"
    assert judged["ratio"] == pytest.approx(1.1)
    assert judged["text"].startswith("disk binds: ")
    assert "1.10 x its bound" in judged["text"]
    order = ["step_in_backward", "more host memory", "twice the tokens", 'state_dtype="bf16"']
    assert [next(w for w in order if w in line) for line in judged["advice"]] == order


def test_narrower_state_is_not_advised_where_coding_costs_more_than_it_saves() -> None:
    found = facts(situation(0.4), trains=True, may_narrow=True)
    assert any("state_dtype" in line for line in verdict(found)["advice"])
    dear = replace(found.ways, coding_s_per_byte=forecast(situation(0.4)).step_s)
    assert not any("state_dtype" in line for line in verdict(replace(found, ways=dear))["advice"])


def test_no_advice_for_what_cannot_be_had() -> None:
    lines = verdict(facts(situation(0.4)))["advice"]
    assert len(lines) == 1
    assert "more host memory" in lines[0]
    fits = verdict(facts(situation(1.0)))
    assert "nothing is moved" in fits["text"]
    assert fits["advice"] == []


def test_far_from_the_bound_the_cause_is_named() -> None:
    far = facts(situation(0.4))
    far = replace(far, step_s=2 * (far.step_s or 0), stalls_s={"checksum": 1.0, "read": 0.1})
    assert "comparing checksums" in verdict(far)["advice"][-1]


def test_a_slower_link_binds() -> None:
    found = facts(situation(0.4))
    assert found.forecast is not None
    link = Limit(3 * found.forecast.bound_s, found.forecast.wire_bound_s, "link")
    slow = verdict(replace(found, limit=link))
    assert (slow["binding"], slow["ratio"]) == ("link", pytest.approx(1.1 / 3, rel=1e-3))
    assert verdict(replace(found, limit=None, forecast=None, now=None))["ratio"] is None
