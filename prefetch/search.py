"""How many rows at once, and what lies where: FlexGen's problem, from measured rates. Pure.

For every pair of batch and number of micro-batches the placement is a small linear program (Sheng
et al. 2023, section 4.3): the shares of weights, of keys and values, and of hidden states in each
tier, which sum to 1, fit the budgets and make the predicted time least. The pair is enumerated.

[Note: time]
A pass takes as long as its slowest lane (disk, host to device, back, device, host). Where the host
computes, reading takes time from the processor and computing from the disk; both are measured
(`Compute`). With R and C the lone seconds of reading and computing:

    T = max(R + disk_drag C, C + drag R)

which is linear in both, so it stays a linear program. Whichever ends last slows down only while
the other runs, so each side pays for what the other really does, not for the whole pass. C has what
the engine does for each layer whose weights come and go, and for each pass. A bound has not.

[Note: what must be there]
While anything is away, the largest module has to have room beside what stays, and so has what is
read ahead meanwhile; that is the same room. With nothing away it is not needed, which is another
linear program. Rows are computed in micro-batches one after the other, as the block engine does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from offload.prefetch.generation import (
    Policy,
    Rates,
    Shape,
    Shares,
    Times,
    Workload,
)
from offload.prefetch.room import frames_bytes
from offload.tiers.spec import Budget, format_size

Line = NDArray[np.float64]  # coefficients of the nine shares, then the constant
MOST_ROWS = 64  # in one micro-batch: beyond this a product's rate hardly grows
_TIERS = ("device", "host", "disk")
_SHARES = 9
_SLACK = 1e-9  # of a budget: what the solver's arithmetic may be off by


class NothingFits(Exception):  # noqa: N818 (says what happened)
    """Not even one row fits. ``smallest_bytes``: the least host memory that would do."""

    def __init__(self, smallest_bytes: int, budget: Budget) -> None:
        super().__init__(
            f"one row needs {format_size(smallest_bytes)} of host memory, and there are "
            f"{format_size(budget.host_bytes)}, with "
            + (f"{format_size(budget.disk_bytes)} of disk" if budget.disk_bytes is not None
               else "no limit on the disk")
        )  # fmt: skip
        self.smallest_bytes = smallest_bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is fixed before the shares are. ``away``: whether anything may be on the disk;
    ``settled``: all weights live on the device, which then has no frames for them.
    """

    batch: int
    micro_batches: int
    away: bool = True
    cpu_attention: bool = False
    settled: bool = False

    @property
    def rows(self) -> int:
        """Rows at once."""
        return self.batch * self.micro_batches


@dataclass(frozen=True, slots=True)
class Problem:
    """All that a search is given. ``kv_away``: keys and values may leave the compute tier.

    ``budget``: what weights, keys and values and activations may take together. ``chunk_bytes``:
    weights come and go in pieces of so many.
    """

    shape: Shape
    rates: Rates
    budget: Budget
    work: Workload
    kv_away: bool = False
    chunk_bytes: int = 1


def search(problem: Problem, allowed: Callable[[Candidate], bool] = lambda _: True) -> Policy:
    """The policy with the least predicted time for the whole workload.

    ``allowed``: what else must hold of a batch and a number of them, for prompts that are not of
    one length. Raises NothingFits where not even one row does.
    """
    tried = filter(allowed, candidates(problem))
    found = [p for c in tried if (p := solve(problem, c)) is not None]
    if not found:
        raise NothingFits(smallest_bytes(problem), problem.budget)
    least_s = min(p.times.total_s for p in found)
    near = [p for p in found if p.times.total_s <= least_s * (1 + 1e-6)]
    return min(near, key=lambda p: (p.rows, p.micro_batches))


def candidates(problem: Problem) -> Iterator[Candidate]:
    """Batches in powers of two and one of all prompts; micro-batches likewise."""
    prompts = problem.work.prompts
    with_device = problem.budget.device_bytes is not None
    ways = (False, True) if with_device and problem.kv_away else (False,)
    settles = (False, True) if with_device else (False,)
    for batch in _steps(min(prompts, MOST_ROWS)):
        micros = _steps(-(-prompts // batch))
        for micro, away, attention, settled in product(micros, (False, True), ways, settles):
            yield Candidate(batch, micro, away, attention, settled)


def smallest_bytes(problem: Problem) -> int:
    """The least host memory with which one row fits: all away that may be, or nothing."""
    held = held_lines(problem, Candidate(1, 1))["host"]
    near = held_lines(problem, Candidate(1, 1, away=False))["host"]
    away = [2, 5 if problem.kv_away else 4, 8]
    if problem.budget.device_bytes is not None and not problem.kv_away:
        away[1] = 3
    least_bytes = held[-1] + held[away].sum()
    if problem.budget.device_bytes is None:
        least_bytes = min(least_bytes, near[-1] + near[[1, 4, 7]].sum())
    return int(np.ceil(least_bytes))


def _steps(most: int) -> list[int]:
    return sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})


def held_lines(problem: Problem, candidate: Candidate) -> dict[str, Line]:
    """Bytes that each tier holds at most, for these shares."""
    weights, rows, work = problem.shape.weights, problem.shape.rows, problem.work
    lines = {tier: np.zeros(_SHARES + 1) for tier in _TIERS}
    kv_bytes = candidate.rows * (work.prompt_tokens + work.new_tokens) * rows.position_bytes
    waiting_bytes = (candidate.rows - candidate.batch) * work.prompt_tokens * rows.waiting_bytes
    for i, tier in enumerate(_TIERS):
        lines[tier][[i, 3 + i, 6 + i]] = weights.pass_bytes, kv_bytes, waiting_bytes
    computing = _computes(problem)
    token_bytes = rows.token_bytes + rows.result_bytes
    running_bytes = candidate.batch * work.prompt_tokens * token_bytes
    lines[computing][-1] = running_bytes + candidate.rows * rows.row_bytes
    if computing == "device" and not candidate.settled:  # read ahead and computed with
        lines["device"][-1] += weights.unit_bytes
    if candidate.away:
        lines["host"][-1] += frames_bytes(weights.unit_bytes, problem.chunk_bytes)
        if problem.kv_away:  # one layer's keys and values, read ahead
            lines["host"][-1] += kv_bytes / weights.layers
        # The spill file has a place for every weight, also for those that stay.
        lines["disk"][[0, 1]] = weights.pass_bytes
        lines["disk"][-1] = weights.lookup_bytes
    else:
        lines["host"][-1] += weights.lookup_bytes
        lines["host"][0] = weights.pass_bytes  # what is on the device keeps its home
    return lines


def lane_lines(problem: Problem, candidate: Candidate, *, prefill: bool) -> dict[str, Line]:
    """Lone seconds of each lane in one pass of a block, for these shares."""
    weights, rows, work = problem.shape.weights, problem.shape.rows, problem.work
    machine = problem.rates.machine
    tokens = work.prompt_tokens if prefill else 1
    past = 0.0 if prefill else work.prompt_tokens + work.new_tokens / 2
    past_bytes = candidate.rows * past * rows.position_bytes
    new_bytes = candidate.rows * tokens * rows.position_bytes
    hidden_bytes = 0.0
    if candidate.micro_batches > 1:
        hidden_bytes = weights.layers * candidate.rows * tokens * rows.waiting_bytes / 3
    disk, h2d, d2h = (np.zeros(_SHARES + 1) for _ in range(3))
    disk[[2, 5, 8]] = np.array([weights.pass_bytes, past_bytes, hidden_bytes])
    disk /= machine.read_bytes_per_s
    disk[[5, 8]] += np.array([new_bytes, hidden_bytes]) / machine.write_bytes_per_s
    lanes = {"disk": disk} | _compute_lines(problem, candidate, tokens, past_bytes)
    if _computes(problem) == "device":
        crossing = 0.0 if candidate.cpu_attention else past_bytes
        h2d[[1, 2]], h2d[[4, 5]], h2d[[7, 8]] = weights.pass_bytes, crossing, hidden_bytes
        d2h[[4, 5]], d2h[[7, 8]] = new_bytes, hidden_bytes
        lanes |= {"h2d": h2d / machine.h2d_bytes_per_s, "d2h": d2h / machine.d2h_bytes_per_s}
    return lanes


def _compute_lines(
    problem: Problem, candidate: Candidate, tokens: int, past_bytes: float
) -> dict[str, Line]:
    """Seconds of the processors: products where the weights are used, attention there or here."""
    weights, rows, rates = problem.shape.weights, problem.shape.rows, problem.rates
    host = np.zeros(_SHARES + 1)
    own = rates.host if rates.device is None else rates.device
    at_once = candidate.batch * tokens
    pass_s = weights.layers * weights.layer_s(at_once, own)
    pass_s += weights.head_elements * own.weight_s(candidate.batch)  # logits of the last token
    scores = candidate.batch * tokens * (tokens - 1) * rows.attention_width
    pass_s += scores * own.weight_s(own.product_s[-1][0]) / own.product_s[-1][0]
    constant_s = candidate.micro_batches * pass_s
    attend_s = past_bytes / own.attend_bytes_per_s
    if rates.device is None:
        host[-1] = constant_s + attend_s
        return {"host": host}
    device = np.zeros(_SHARES + 1)
    device[-1] = constant_s
    device[[3, 4, 5]] = attend_s
    if candidate.cpu_attention:
        device[[4, 5]] = 0.0
        host[[4, 5]] = past_bytes / rates.host.attend_bytes_per_s
    return {"device": device, "host": host}


def expected_lines(problem: Problem, candidate: Candidate, lanes: dict[str, Line]) -> list[Line]:
    """A pass takes at least each of these: see the note on time."""
    if problem.rates.device is not None:
        return list(lanes.values())
    read, compute, host = lanes["disk"], lanes["host"].copy(), problem.rates.host
    compute[-1] += managing_s(problem, candidate)
    return [read + compute * host.disk_drag, compute + read * host.drag]


def managing_s(problem: Problem, candidate: Candidate) -> float:
    """Seconds of the processor in one pass of a block that are no products.

    Hooks come off where nothing is away.
    """
    host, layers = problem.rates.host, problem.shape.weights.layers
    return candidate.micro_batches * (host.pass_s + layers * host.handling_s * candidate.away)


def _computes(problem: Problem) -> str:
    return "host" if problem.rates.device is None else "device"


def solve(problem: Problem, candidate: Candidate) -> Policy | None:
    """The best shares for a candidate; None where it does not fit."""
    held = held_lines(problem, candidate)
    lanes = [lane_lines(problem, candidate, prefill=p) for p in (True, False)]
    expected = [expected_lines(problem, candidate, each) for each in lanes]
    passes = problem.work.new_tokens - 1
    limits, rooms = _limits(problem, held)
    for phase, lines in enumerate(expected):
        for line in lines:
            limits.append(np.append(line[:-1], [-1.0 * (phase == 0), -1.0 * (phase == 1)]))
            rooms.append(-line[-1])
    sums = np.kron(np.eye(3), np.ones(3))
    # A breath of cost for shares that change no time: what can be near is near.
    prefer = 1e-9 * _scale(expected) * np.tile([0.0, 1.0, 2.0], 3)
    answer = linprog(
        np.append(prefer, [1.0, max(passes, 1e-6)]),
        A_ub=np.array(limits), b_ub=np.array(rooms),
        A_eq=np.hstack([sums, np.zeros((3, 2))]), b_eq=np.ones(3),
        bounds=[*_bounds(problem, candidate), (0, None), (0, None)],
        method="highs",
    )  # fmt: skip
    if not answer.success:
        return None
    shares = np.clip(answer.x[:_SHARES], 0.0, 1.0) + 0.0  # no -0.0
    return policy_of(problem, candidate, shares)


def _limits(problem: Problem, held: dict[str, Line]) -> tuple[list[Line], list[float]]:
    """Rows of the program for the budgets, each scaled to its budget."""
    budget = problem.budget
    given = {"device": budget.device_bytes, "host": budget.host_bytes, "disk": budget.disk_bytes}
    limits, rooms = [], []
    for tier, room_bytes in given.items():
        if room_bytes is None:
            continue  # no device: its shares are 0; no limit on the disk
        scale = max(room_bytes, 1)
        limits.append(np.append(held[tier][:-1] / scale, [0.0, 0.0]))
        rooms.append((room_bytes - held[tier][-1]) / scale - _SLACK)
    return limits, rooms


def _bounds(problem: Problem, candidate: Candidate) -> list[tuple[float, float]]:
    device = float(problem.rates.device is not None)
    away = float(candidate.away)
    weights = [(0.0, device), (0.0, 1.0), (0.0, away)]
    if candidate.settled:
        weights = [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0)]
    kv = [(0.0, device), (0.0, 1.0), (0.0, away)]
    if not problem.kv_away:  # where attention is computed
        kv = [(device, device), (1.0 - device, 1.0 - device), (0.0, 0.0)]
    return [*weights, *kv, (0.0, device), (0.0, 1.0), (0.0, away)]


def _scale(expected: list[list[Line]]) -> float:
    return float(max(np.abs(line).sum() for lines in expected for line in lines))


def pass_times(problem: Problem, candidate: Candidate, shares: Line) -> list[tuple[float, str]]:
    """[(expected seconds, binding lane)] of the prefill and of a later pass."""
    full = np.append(shares, 1.0)
    found = []
    for prefill in (True, False):
        lanes = lane_lines(problem, candidate, prefill=prefill)
        lone = {name: float(line @ full) for name, line in lanes.items()}
        binding = max(lone, key=lambda name: lone[name])
        expected_s = max(float(x @ full) for x in expected_lines(problem, candidate, lanes))
        found.append((max(expected_s, lone[binding]), binding))
    return found


def bound_times(problem: Problem, candidate: Candidate, shares: Line) -> tuple[float, float]:
    """The slowest lane's lone seconds in the prefill and in a later pass."""
    full = np.append(shares, 1.0)
    first, later = (
        max(float(x @ full) for x in lane_lines(problem, candidate, prefill=p).values())
        for p in (True, False)
    )
    return first, later


def policy_of(problem: Problem, candidate: Candidate, shares: Line) -> Policy:
    """What these nine shares are predicted to give."""
    blocks = -(-problem.work.prompts // candidate.rows)
    work, passes = problem.work, problem.work.new_tokens - 1
    (prefill_s, first), (pass_s, later) = pass_times(problem, candidate, shares)
    bound_first_s, bound_later_s = bound_times(problem, candidate, shares)
    total_s = blocks * (prefill_s + passes * pass_s)
    binding = later if passes * bound_later_s >= bound_first_s else first
    held = held_lines(problem, candidate)
    full = np.append(shares, 1.0)
    weights, kv, hidden = (Shares(*map(float, shares[i : i + 3])) for i in (0, 3, 6))
    return Policy(
        candidate.batch, candidate.micro_batches, weights, kv, hidden, candidate.cpu_attention,
        Times(prefill_s, pass_s, total_s, blocks * (bound_first_s + passes * bound_later_s),
              binding, prefill_s),
        {tier: float(line @ full) for tier, line in held.items()},
        work.prompts * work.new_tokens / total_s,
    )  # fmt: skip
