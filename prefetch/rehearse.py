"""A policy rehearsed: the planner and its simulation say what passes read and how long. Pure.

The search takes the largest module's room for lost, and that reading and computing overlap as far
as their lengths allow. The planner that will run the passes loses other bytes, by the sizes of
chunks and what it keeps for reading ahead, and some time; it is given a trace made from the shape.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from offload.prefetch.generation import Policy, Shares
from offload.prefetch.planner import DoesNotFit, plan
from offload.prefetch.room import frames_bytes
from offload.prefetch.search import (
    Candidate,
    Problem,
    held_lines,
    lane_lines,
    managing_s,
    policy_of,
)
from offload.prefetch.sharing import Sharing
from offload.prefetch.simulate import Timeline, simulate
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace

_MODULES = 8  # of a layer: what is needed at once is about so small a part of it


def rehearse(problem: Problem, policy: Policy) -> Policy:
    """The policy with the weights' shares that the planner reaches, and times to match.

    Unchanged where the planner does not reach: with a device, with keys and values on disk, and
    where all fits.
    """
    if problem.rates.device is not None or policy.kv.disk > 0 or policy.weights.disk <= 0:
        return policy
    candidate = Candidate(policy.batch, policy.micro_batches)
    forecasts = [_forecast(problem, candidate, policy, p) for p in (True, False)]
    if None in forecasts:
        return policy
    first, later = (f for f in forecasts if f is not None)
    away = min(later.read_bytes / problem.shape.weights.pass_bytes, 1.0)
    found = replace(policy, weights=Shares(0.0, 1.0 - away, away))
    found = policy_of(problem, candidate, shares_of(found))
    prefill_s = max(found.times.prefill_s, first.step_s)
    pass_s = max(found.times.pass_s, later.step_s)
    work, blocks = problem.work, -(-problem.work.prompts // candidate.rows)
    first_s = max(prefill_s, _on_demand_s(problem, candidate, policy))
    total_s = first_s + (blocks - 1) * prefill_s + blocks * (work.new_tokens - 1) * pass_s
    times = replace(
        found.times, prefill_s=prefill_s, pass_s=pass_s, total_s=total_s, first_s=first_s
    )
    return replace(found, times=times, tokens_per_s=work.prompts * work.new_tokens / total_s)


def _on_demand_s(problem: Problem, candidate: Candidate, policy: Policy) -> float:
    """Of the first prompts' pass: all weights are read, none while anything is computed.

    What was used longest ago leaves first, which in a pass is what is wanted next.
    """
    read_bytes = problem.shape.weights.pass_bytes
    compute_s = _compute_s(problem, candidate, policy, prefill=True)
    return compute_s + read_bytes / problem.rates.machine.read_bytes_per_s


def _compute_s(problem: Problem, candidate: Candidate, policy: Policy, *, prefill: bool) -> float:
    line = lane_lines(problem, candidate, prefill=prefill)["host"]
    products_s = float(line @ np.append(shares_of(policy), 1.0))
    return products_s + managing_s(problem, candidate)


def _forecast(
    problem: Problem, candidate: Candidate, policy: Policy, prefill: bool
) -> Timeline | None:
    """Of one pass; None where the planner finds no room for what the program took for possible."""
    full = np.append(shares_of(policy), 1.0)
    compute_s = _compute_s(problem, candidate, policy, prefill=prefill)
    full[:3] = 0.0
    other_bytes = int(held_lines(problem, candidate)["host"] @ full)
    other_bytes -= frames_bytes(problem.shape.weights.unit_bytes, problem.chunk_bytes)
    trace = pass_trace(problem, compute_s, other_bytes)
    machine, capacity_bytes = problem.rates.machine, problem.budget.host_bytes
    try:
        made = plan(trace, machine, capacity_bytes)
    except DoesNotFit:
        return None
    sharing = Sharing.of(problem.rates.host.drag, problem.rates.host.disk_drag)
    return simulate(trace, machine, capacity_bytes, made.ops, made.resident_at_start, sharing)


def shares_of(policy: Policy) -> np.typing.NDArray[np.float64]:
    """The nine shares, as the program has them."""
    return np.array([
        getattr(shares, tier) for shares in (policy.weights, policy.kv, policy.hidden)
        for tier in ("device", "host", "disk")
    ])  # fmt: skip


def pass_trace(problem: Problem, compute_s: float, other_bytes: int) -> Trace:
    """One pass. Lookup tables, layers and head stand in one run, cut at equal lengths."""
    weights, chunk_bytes = problem.shape.weights, problem.chunk_bytes
    experts = weights.experts
    dense_bytes = weights.layer_bytes - experts.layer_bytes
    dense_elements = weights.layer_elements - experts.layer_elements
    parts = [(dense_bytes / _MODULES, dense_elements / _MODULES)] * _MODULES
    if experts.layer_bytes:  # needed at once
        parts.append((float(experts.layer_bytes), float(experts.layer_elements)))
    parts *= weights.layers
    if weights.head_bytes:
        parts.append((weights.head_bytes, weights.head_elements))
    elements = max(sum(count for _, count in parts), 1)
    moments, at = [], float(weights.lookup_bytes)
    for size_bytes, count in parts:
        first, last = int(at // chunk_bytes), int((at + size_bytes - 1) // chunk_bytes)
        needs = tuple(Need(c, Access.READ) for c in range(first, last + 1))
        moments.append(Moment(Phase.FORWARD, needs, compute_s * count / elements, other_bytes))
        at += size_bytes
    return Trace(tuple(moments), (chunk_bytes,) * (int(at // chunk_bytes) + 1), {})
