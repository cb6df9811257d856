"""How short could a recorded step be? The least time of its trace, by linear programming.

``bound_s`` lets everything overlap that no barrier separates, as if memory were not full of
something else. Here a chunk can only be read ahead into memory that is free, and memory is free
only once what was there has been written. Chunks may be split at will, the drive moves both
directions at its measured rates, no transfer has latency, the engine costs nothing: no schedule of
this trace within this memory is shorter, and none need be as short. No part of the planner takes
part.

For each gap between two uses of a chunk: E, R, W, the bytes given up, read back and written by
the end of each moment, all of them growing; E <= W where the chunk was changed. Memory that chunks
hold, with what activations took as recorded, fits the budget when the moment begins: what is read
beside a moment takes no room before the next. A moment lasts as long as its computing and as its
transfers take, which are slower beside computing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from offload.prefetch.trace import Access, Trace
from offload.tiers.spec import MIB, Machine


@dataclass(frozen=True)
class Gap:
    """A stretch between two uses in which a chunk may be elsewhere; ``last`` may be a step later.

    ``changed``: what is given up must have been written, once since its last change, which was
    before this gap or, where ``goes_on``, before the one found before it.
    """

    chunk: int
    first: int
    last: int
    changed: bool
    goes_on: bool
    read: bool


def gaps_of(trace: Trace) -> list[Gap]:
    """All gaps. Those of one chunk follow each other from one of its changes on."""
    uses: dict[int, list[tuple[int, Access]]] = {}
    for at, moment in enumerate(trace.moments):
        for need in moment.needs:
            uses.setdefault(need.chunk, []).append((at, need.access))
    found = []
    for chunk, seen in uses.items():
        begin = next((k for k, (_, how) in enumerate(seen) if how is not Access.READ), None)
        turned = seen if begin is None else seen[begin:] + seen[:begin]
        goes_on = False
        for (at, how), (then, after) in zip(turned, [*turned[1:], turned[0]], strict=True):
            goes_on &= how is Access.READ
            end = then if then > at else then + len(trace.moments)
            read = after is not Access.FRESH
            dies = {trace.dead_after[chunk]} if chunk in trace.dead_after and not read else set()
            # Rubbish before it is written anew: costs nothing there, at most.
            dies |= {t + len(trace.moments) for t in dies}
            if end - at > 1 and dies.isdisjoint(range(at, end)):
                found.append(Gap(chunk, at, end, begin is not None, goes_on, read))
                goes_on = True
    return found


class Rows:
    """Sparse rows of a linear program: row . x <= limit."""

    def __init__(self) -> None:
        self.entries: tuple[list[int], list[int], list[float]] = ([], [], [])
        self.limits: list[float] = []

    def add(self, limit: float, *terms: tuple[int, float]) -> None:
        """One more row."""
        for column, value in terms:
            for kept, new in zip(self.entries, (len(self.limits), column, value), strict=True):
                kept.append(new)  # type: ignore[arg-type]
        self.limits.append(limit)


def drive(machine: Machine) -> list[tuple[float, float]]:
    """Seconds per byte read and written: each pair is a side of what the drive can do at once."""
    read, write = machine.read_bytes_per_s, machine.write_bytes_per_s
    both_read, both_write = machine.mixed_read_bytes_per_s, machine.mixed_write_bytes_per_s
    if both_read / read + both_write / write <= 1.0:
        return [(1 / read, 1 / write)]
    return [
        (1 / read, (1 - both_read / read) / both_write),
        ((1 - both_write / write) / both_read, 1 / write),
    ]


def stretches(trace: Trace, count: int) -> list[int]:
    """For each moment the number of its stretch: about ``count`` of them, alike in computing."""
    total_s = sum(m.compute_s for m in trace.moments)
    number, passed_s, found = 0, 0.0, []
    for moment in trace.moments:
        found.append(number)
        passed_s += moment.compute_s
        if passed_s >= (number + 1) * total_s / count:
            number += 1
    return found


def least_s(trace: Trace, machine: Machine, capacity_bytes: int, count: int = 48) -> float:
    """The optimum of the linear program in the module's docstring, in seconds.

    Moments are taken together in ``count`` stretches, within which transfers may come in any order
    and memory is counted at the fullest moment alone: that makes it smaller, never larger.
    """
    moments, stretch = len(trace.moments), stretches(trace, count)
    number = stretch[-1] + 1
    needed = [
        m.other_bytes + sum(trace.chunk_bytes[c] for c in {n.chunk for n in m.needs})
        for m in trace.moments
    ]
    fullest = [
        max((t for t in range(moments) if stretch[t] == k), key=lambda t: needed[t])
        for k in range(number)
    ]
    held = [float(needed[t]) for t in fullest]
    rows, columns, written = Rows(), number, 0  # the first columns: seconds of each stretch
    memory: list[list[tuple[int, float]]] = [[] for _ in range(number)]
    moved: list[list[tuple[int, float, float]]] = [[] for _ in range(number)]
    for gap in gaps_of(trace):
        size = float(trace.chunk_bytes[gap.chunk])
        turn, end = divmod(gap.last, moments)
        spans = range(stretch[gap.first], stretch[end] + turn * number + 1)
        gone, back, wrote = (columns + k * len(spans) for k in range(3))
        columns += 3 * len(spans)
        if gap.goes_on:
            rows.add(0.0, (written, 1.0), (wrote, -1.0))
            moved[spans[0] % number].append((written, 0.0, -1.0))
        for k, span in enumerate(spans):
            turn, here = divmod(span, number)
            before = [(back + k - 1, 1.0)] if k else []
            if gap.first < fullest[here] + turn * moments < gap.last:
                held[here] += size
                memory[here] += [(gone + k, -1.0), *before]
            rows.add(size, (gone + k, 1.0), *((c, -v) for c, v in before))
            rows.add(0.0, (back + k, 1.0), (gone + k, -1.0))
            moved[here] += [(back + k, 1.0, 0.0), (wrote + k, 0.0, 1.0)]
            if k:
                moved[here] += [(back + k - 1, -1.0, 0.0), (wrote + k - 1, 0.0, -1.0)]
                for column in (gone, back, wrote):
                    rows.add(0.0, (column + k - 1, 1.0), (column + k, -1.0))
            if gap.changed:
                rows.add(0.0, (gone + k, 1.0), (wrote + k, -1.0))
        written = wrote + len(spans) - 1
        if gap.read:
            rows.add(0.0, (gone + len(spans) - 1, 1.0), (back + len(spans) - 1, -1.0))
    seconds, lost = np.zeros(number), 1.0 - machine.beside_share
    for k, moment in zip(stretch, trace.moments, strict=True):
        seconds[k] += moment.compute_s
    for k in range(number):
        rows.add(capacity_bytes - held[k], *memory[k])
        for read_s, write_s in drive(machine):
            terms = [(c, r * read_s + w * write_s) for c, r, w in moved[k]]
            rows.add(-lost * seconds[k], (k, -1.0), *terms)
    return _solve(rows, columns, seconds)


def _solve(rows: Rows, columns: int, seconds: Any) -> float:
    """Bytes in MiB, so that the numbers are of one size."""
    at, column, value = (np.array(part) for part in rows.entries)
    scaled = np.where(column < len(seconds), value, value * MIB)
    is_time = np.zeros(len(rows.limits), dtype=bool)
    is_time[at[column < len(seconds)]] = True
    scaled = np.where(is_time[at], scaled, scaled / MIB)
    matrix = coo_matrix((scaled, (at, column)), shape=(len(rows.limits), columns))
    limits = np.where(is_time, rows.limits, np.array(rows.limits) / MIB)
    lower = np.zeros(columns)
    lower[: len(seconds)] = seconds
    cost = np.zeros(columns)
    cost[: len(seconds)] = 1.0
    bounds = np.column_stack([lower, np.full(columns, np.inf)])
    solved = linprog(cost, A_ub=matrix.tocsr(), b_ub=limits, bounds=bounds, method="highs")
    if not solved.success:
        raise RuntimeError(f"no schedule fits this trace: {solved.message}")
    return float(solved.fun)
