"""An adversarial lane for tests: completes transfers as late and in as odd an order as it may."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable

from offload.tiers.lane import SPANS_KEPT, Meter, Span, Ticket, numbered


class AdversarialLane:
    """Holds every transfer back until somebody waits; then runs them in a seeded random order.

    An engine that forgets a wait reads poison; one that relies on FIFO completion breaks.
    """

    def __init__(self, seed: int) -> None:
        self.meter = Meter()
        self.spans: deque[Span] = deque(maxlen=SPANS_KEPT)
        self._random = random.Random(seed)
        self._held: list[tuple[Ticket, Callable[[], int], int]] = []

    def submit(self, ticket: Ticket, work: Callable[[], int], size_bytes: int) -> None:
        self._held.append((ticket, work, size_bytes))
        if self._random.random() < 0.2:
            self._run_one()

    def wait(self, ticket: Ticket) -> None:
        while not ticket.done:
            self._run_one()
        ticket.wait()

    def between(self, first: int, last: int) -> list[Span]:
        return numbered(self.spans, self.meter.transfers, first, last)

    def close(self) -> None:
        while self._held:
            self._run_one()

    def _run_one(self) -> None:
        ticket, work, size_bytes = self._held.pop(self._random.randrange(len(self._held)))
        start_s = time.perf_counter()
        ticket.run(work)
        self.meter.moved_bytes += size_bytes
        self.meter.transfers += 1
        self.meter.busy_s += time.perf_counter() - start_s
        self.spans.append((ticket.chunk, start_s, time.perf_counter(), size_bytes))
