"""The policy search: budgets, monotony, the exact optimum; shapes; the command."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.errors import BudgetError
from offload.plan_cli import attention_of, choose
from offload.prefetch.generation import Policy, Rates, RowCost, Shape, Weights, Workload
from offload.prefetch.search import (
    Candidate,
    NothingFits,
    Problem,
    held_lines,
    policy_of,
    search,
    smallest_bytes,
    solve,
)
from offload.tiers.spec import MIB, Budget, Compute, Machine

MACHINE = Machine(2e9, 4e9, 1e9, 1e9, 1e10, h2d_bytes_per_s=1e10, d2h_bytes_per_s=8e9)
HOST = Compute(((1, 2e-10), (8, 3e-10), (64, 1e-9)), 5e9, drag=0.4, disk_drag=0.2)
DEVICE = Compute(((1, 1e-11), (64, 3e-11)), 3e11)
SHAPE = Shape(
    Weights(8, 10 * MIB, 5 * MIB, 30 * MIB, 15 * MIB, 30 * MIB, 30 * MIB),
    RowCost(64 * 1024, 40_000, 8_000, 100_000, 4096),
)
WORK = Workload(16, 32, 32)


def problem(host_bytes: int, **changes: object) -> Problem:
    """Host only, ordinary rates."""
    made = Problem(SHAPE, Rates(MACHINE, HOST), Budget(host_bytes), WORK)
    return replace(made, **changes)  # type: ignore[arg-type]


def with_device(host_bytes: int, device_bytes: int) -> Problem:
    """Three tiers, keys and values anywhere."""
    return problem(
        host_bytes, rates=Rates(MACHINE, HOST, DEVICE),
        budget=Budget(host_bytes, device_bytes), kv_away=True,
    )  # fmt: skip


sizes = st.integers(20 * MIB, 400 * MIB)
works = st.builds(Workload, st.integers(1, 20), st.integers(1, 200), st.integers(1, 50))


def found_or_none(asked: Problem) -> Policy | None:
    """The policy, or None where nothing fits."""
    try:
        return search(asked)
    except NothingFits:
        return None


@settings(max_examples=15, deadline=None)
@given(host=sizes, disk=st.none() | sizes, device=st.none() | sizes, work=works, away=st.booleans())
def test_no_budget_is_exceeded(
    host: int, disk: int | None, device: int | None, work: Workload, away: bool
) -> None:
    rates = Rates(MACHINE, HOST, DEVICE if device else None)
    found = found_or_none(Problem(SHAPE, rates, Budget(host, device, disk), work, away))
    if found is None:
        return
    weights = SHAPE.weights
    on = [found.weights, found.kv, found.hidden]
    assert all(abs(s.device + s.host + s.disk - 1) < 1e-6 for s in on)
    for name, room in (("host", host), ("disk", disk), ("device", device)):
        if room is not None:
            assert found.held_bytes[name] <= room
            kv_bytes = found.rows * (work.prompt_tokens + work.new_tokens) * 64 * 1024
            share = getattr(found.kv, name) * kv_bytes
            assert share + getattr(found.weights, name) * weights.pass_bytes <= room
    assert found.times.bound_s <= found.times.total_s * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@given(least=sizes, more=st.integers(0, 200 * MIB), work=works)
def test_more_memory_is_never_slower(least: int, more: int, work: Workload) -> None:
    small = found_or_none(problem(least, work=work))
    large = found_or_none(problem(least + more, work=work))
    if small is not None:
        assert large is not None
        assert large.times.total_s <= small.times.total_s * (1 + 1e-6)


@pytest.mark.parametrize("host_mib", [60, 90, 120])
@pytest.mark.parametrize("candidate", [Candidate(1, 1), Candidate(8, 1), Candidate(4, 4)])
def test_the_program_finds_what_trying_finds(host_mib: int, candidate: Candidate) -> None:
    """On a grid of shares, with the time of a pass written down once more, by hand."""
    asked = problem(host_mib * MIB, kv_away=True)
    found = solve(asked, candidate)
    grid = [i / 40 for i in range(41)]
    tried = [t for w, c in product(grid, grid) if (t := by_hand(asked, candidate, w, c))]
    if found is None:
        assert not tried
        return
    assert tried
    assert found.times.total_s <= min(tried) * (1 + 1e-6)
    assert found.times.total_s >= min(tried) * 0.96  # the grid is that coarse


@pytest.mark.parametrize(("away", "kv_away"), [(0.5, 0.5), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_times_are_those_written_down_by_hand(away: float, kv_away: float) -> None:
    asked, candidate = problem(900 * MIB, kv_away=True), Candidate(4, 2)
    shares = np.array([0.0, 1 - away, away, 0.0, 1 - kv_away, kv_away, 0.0, 1.0, 0.0])
    found = policy_of(asked, candidate, shares).times.total_s
    assert found == pytest.approx(by_hand(asked, candidate, away, kv_away))


def by_hand(asked: Problem, candidate: Candidate, away: float, kv_away: float) -> float | None:
    """Total seconds with these parts on disk, hidden states in memory; None: too much memory."""
    rows, prompt, new = candidate.rows, asked.work.prompt_tokens, asked.work.new_tokens
    kv_bytes = rows * (prompt + new) * 65536
    held = (1 - away) * 110 * MIB + (1 - kv_away) * kv_bytes + 30 * MIB + kv_bytes / 8
    held += candidate.batch * prompt * 40_000 + (rows - candidate.batch) * prompt * 8_000
    if held + rows * 100_000 > asked.budget.host_bytes:
        return None
    phases = []
    for tokens, past in ((prompt, 0.0), (1, prompt + new / 2)):
        read_s = (away * 110 * MIB + kv_away * rows * past * 65536) / 2e9
        read_s += kv_away * rows * tokens * 65536 / 4e9
        at_once = candidate.batch * tokens
        work_s = 8 * 5 * MIB * HOST.weight_s(at_once) + 15 * MIB * HOST.weight_s(candidate.batch)
        work_s += at_once * (tokens - 1) * 4096 * 1e-9 / 64
        work_s = candidate.micro_batches * work_s + rows * past * 65536 / 5e9
        phases.append(max(read_s + 0.2 * work_s, work_s + 0.4 * read_s))
    return -(-asked.work.prompts // rows) * (phases[0] + (new - 1) * phases[1])


def test_a_device_is_used() -> None:
    host_only, both = search(problem(90 * MIB)), search(with_device(90 * MIB, 80 * MIB))
    assert both.weights.device > 0.1
    assert both.times.total_s < host_only.times.total_s
    all_there = search(with_device(90 * MIB, 800 * MIB))
    assert all_there.weights.device == pytest.approx(1)
    assert all_there.times.binding == "device"


def test_weights_that_all_live_on_the_device_take_no_frame_there() -> None:
    asked, settled = with_device(4000 * MIB, 0), Candidate(1, 1, settled=True)
    held = held_lines(asked, settled)["device"]
    fits_bytes = int(held[[0, 3, 6, -1]].sum()) + 1024  # all of it there
    asked = replace(asked, budget=Budget(4000 * MIB, fits_bytes))
    framed, found = solve(asked, Candidate(1, 1)), search(asked, lambda c: c.rows == 1)
    assert framed is not None
    assert framed.weights.device < 1 - 1e-3
    assert found.weights.device == pytest.approx(1)
    assert found.times.pass_s < framed.times.pass_s
    assert found.held_bytes["device"] <= fits_bytes
    less = replace(asked, budget=Budget(4000 * MIB, fits_bytes - SHAPE.weights.layer_bytes))
    assert search(less, lambda c: c.rows == 1).weights.device < 1


def test_what_is_on_a_device_keeps_its_home_on_the_host_where_there_is_no_disk() -> None:
    asked = with_device(90 * MIB, 800 * MIB)
    for host_mib, fits in ((90, False), (150, True)):
        budget = replace(asked.budget, host_bytes=host_mib * MIB, disk_bytes=0)
        assert (found_or_none(replace(asked, budget=budget)) is not None) is fits


def test_many_rows_share_a_reading() -> None:
    one, many = (search(problem(90 * MIB, work=Workload(n, 8, 32))) for n in (1, 16))
    assert one.times.binding == "disk"
    assert many.rows > 4
    assert many.tokens_per_s > 4 * one.tokens_per_s


def test_too_little_is_refused_with_what_would_do() -> None:
    asked = problem(20 * MIB)
    with pytest.raises(NothingFits) as error:
        search(asked)
    assert smallest_bytes(asked) == error.value.smallest_bytes
    search(problem(error.value.smallest_bytes + 1024))
    with pytest.raises(NothingFits):
        search(problem(error.value.smallest_bytes - 1024))
    with pytest.raises(BudgetError, match="--host-memory") as refused:
        choose(asked)
    assert refused.value.needed_bytes >= error.value.smallest_bytes


def test_products_between_and_beyond_what_was_measured() -> None:
    assert HOST.weight_s(1) == 2e-10
    assert HOST.weight_s(4.5) == pytest.approx(2.5e-10)
    assert HOST.weight_s(128) == pytest.approx(2e-9)
    assert Compute.from_dict(json.loads(json.dumps(HOST.to_dict()))) == HOST
    with pytest.raises(ValueError, match="ascending"):
        Compute(((8, 1.0), (1, 1.0)), 1.0)
    with pytest.raises(ValueError, match="disk_drag"):
        Compute(((1, 1.0),), 1.0, disk_drag=1.5)
    with pytest.raises(ValueError, match="new_tokens"):
        Workload(1, 1, 0)


def test_the_rehearsal_knows_that_lanes_share_and_that_the_first_pass_reads_on_demand() -> None:
    shared = choose(problem(80 * MIB)).times
    apart = replace(HOST, drag=0.0, disk_drag=0.0)
    policy = choose(problem(80 * MIB, rates=Rates(MACHINE, apart)))
    lone, blocks = policy.times, -(-WORK.prompts // policy.rows)
    assert shared.pass_s > 1.05 * lone.pass_s
    assert lone.first_s > lone.prefill_s
    assert lone.first_s > SHAPE.weights.pass_bytes / MACHINE.read_bytes_per_s
    later_s = (blocks - 1) * lone.prefill_s + blocks * (WORK.new_tokens - 1) * lone.pass_s
    assert lone.total_s == pytest.approx(lone.first_s + later_s)
    everything = choose(problem(800 * MIB)).times
    assert everything.first_s == everything.prefill_s


def test_attention_goes_where_the_keys_and_values_cross_least() -> None:
    """Long histories on the host: over a slow bus they stay there, over a fast one they cross."""
    asked = with_device(4000 * MIB, 160 * MIB)
    asked = replace(asked, work=Workload(16, 1000, 64))
    for h2d, on_host in ((1e9, True), (1e12, False)):
        machine = replace(MACHINE, h2d_bytes_per_s=h2d)
        found = search(replace(asked, rates=Rates(machine, HOST, DEVICE)))
        assert found.kv.device < 1
        assert found.cpu_attention == on_host
        assert ("--attention host" in attention_of(found)) == on_host
