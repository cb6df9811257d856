"""A trace as columns: every use of every chunk, for questions asked of all of them at once."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.prefetch.trace import Access, Trace

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Uses:
    """Every use of a chunk in one step as columns, one row each, ordered by chunk and moment.

    A chunk named twice in one moment has one use there: the first access says whether contents
    are needed (``reads``), and any access but READ leaves the chunk changed (``changes``).
    ``bounds[c]``: row of chunk c's first use; ``bounds[c + 1]`` is behind its last.
    ``needed_bytes[t]``: what moment t needs at once.
    """

    chunk: Ints
    moment: Ints
    reads: Bools
    changes: Bools
    bounds: Ints
    needed_bytes: Ints


def find_uses(trace: Trace) -> Uses:
    """The uses of every chunk of the trace."""
    needs = [need for moment in trace.moments for need in moment.needs]
    moment = np.repeat(np.arange(len(trace.moments)), [len(m.needs) for m in trace.moments])
    chunk = np.array([need.chunk for need in needs], dtype=np.int64)
    reads = np.array([need.access is not Access.FRESH for need in needs], dtype=bool)
    changes = np.array([need.access is not Access.READ for need in needs], dtype=bool)
    order = np.argsort(chunk, kind="stable")
    chunk, moment, reads, changes = chunk[order], moment[order], reads[order], changes[order]
    first = np.flatnonzero((np.diff(chunk, prepend=-1) != 0) | (np.diff(moment, prepend=-1) != 0))
    if len(first):
        changes = np.logical_or.reduceat(changes, first)
    chunk, moment, reads = chunk[first], moment[first], reads[first]
    bounds = np.searchsorted(chunk, np.arange(len(trace.chunk_bytes) + 1))
    size_bytes = np.array(trace.chunk_bytes, dtype=np.float64)[chunk]
    needed = np.bincount(moment, size_bytes, len(trace.moments)).astype(np.int64)
    return Uses(chunk, moment, reads, changes, bounds, needed)


def deaths(trace: Trace, uses: Uses) -> dict[int, int]:
    """``trace.dead_after`` without the entries whose chunk's next use is not FRESH.

    Those contradict themselves; the safe reading is that the contents still matter.
    """
    alive = {}
    bounds, moment, reads = uses.bounds.tolist(), uses.moment.tolist(), uses.reads.tolist()
    for chunk, dead in trace.dead_after.items():
        begin, end = bounds[chunk], bounds[chunk + 1]
        later = bisect_right(moment, dead, begin, end)
        if begin < end and not reads[later if later < end else begin]:
            alive[chunk] = dead
    return alive
