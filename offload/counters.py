"""What happened in one tier, for stats and for tests that must know that it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

Stall = tuple[float, float, str, int]  # from and to, in s of time.perf_counter; cause; chunk


@dataclass(slots=True)
class Counters:
    """``stall_s``: seconds the loop waited, by cause. ``below``: of the tier it copies from.

    ``seen`` is told of each wait, while somebody records.
    """

    demand_loads: int = 0
    planned_loads: int = 0
    evictions: int = 0
    forced_evictions: int = 0
    stall_s: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "write": 0.0, "checksum": 0.0}
    )
    below: Counters | None = None
    seen: Callable[[Stall], None] | None = None

    def stalled_s(self, *, below: bool) -> float:
        """All seconds of waiting for transfers so far; with those of the tiers below.

        A checksum is the processor's own work: plans are to know it as such.
        """
        mine_s = sum(s for cause, s in self.stall_s.items() if cause != "checksum")
        return mine_s + self.below.stalled_s(below=True) if below and self.below else mine_s

    def waited(self, cause: str, chunk: int, start_s: float) -> None:
        """The loop has waited until now for a chunk (-1: for other bytes)."""
        end_s = time.perf_counter()
        self.stall_s[cause] += end_s - start_s
        if self.seen is not None:
            self.seen((start_s, end_s, cause, chunk))

    @contextmanager
    def waiting(self, cause: str, chunk: int) -> Iterator[None]:
        """What is done within may block: its time is charged to the cause."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.waited(cause, chunk, start_s)
