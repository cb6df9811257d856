"""Lanes: FIFO workers that move bytes, and Tickets that say when a transfer is complete.

Workers only move bytes. What follows from a completion (an installed home, a freed frame) is
done by the thread that owns the engine, when it polls: state has one owner and needs no locks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from offload.tiers.sched import ask_for_short_slices

# Of a disk's lane, each direction, and of whoever measures one: a fast drive wants two, while one
# hands over and takes checksums.
DISK_WORKERS = 3


class Ticket:
    """Completion of one transfer; an error raises where the ticket is awaited."""

    __slots__ = ("_done", "_error", "chunk", "result")

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk
        self.result: int = 0  # the transferred bytes' checksum
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def run(self, work: Callable[[], int]) -> None:
        """Do the transfer here and now, keeping its checksum or its error."""
        try:
            self.result = work()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def wait(self) -> None:
        """Block until the transfer is over; raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error


@dataclass(slots=True)
class Meter:
    """What a lane has moved since it was made: bytes, transfers, seconds with work in flight."""

    moved_bytes: int = 0
    transfers: int = 0
    busy_s: float = 0.0

    def copy(self) -> Meter:
        return Meter(self.moved_bytes, self.transfers, self.busy_s)


Span = tuple[int, float, float, int]  # a transfer: chunk, start and end in seconds, bytes
SPANS_KEPT = 65536


class Lane(Protocol):
    """What the engine knows of a lane."""

    meter: Meter

    def submit(self, ticket: Ticket, work: Callable[[], int], size_bytes: int) -> None:
        """Queue a transfer."""
        ...

    def wait(self, ticket: Ticket) -> None:
        """Block until this ticket is done; raises its error."""
        ...

    def between(self, first: int, last: int) -> list[Span]:
        """Transfers ``first`` to ``last`` - 1, as the meter counts them: those still known."""
        ...

    def close(self) -> None:
        """Finish what is queued and stop the workers."""
        ...


def numbered(spans: deque[Span], count: int, first: int, last: int) -> list[Span]:
    """Those of these numbers, where ``spans`` ends with number ``count`` - 1."""
    tail = list(islice(reversed(spans), count - last, count - first))
    return tail[::-1]


class ThreadLane:
    """A lane of real threads. The GIL is released inside the transfers and the checksums."""

    def __init__(self, name: str, workers: int) -> None:
        self.meter = Meter()
        self.spans: deque[Span] = deque(maxlen=SPANS_KEPT)
        self._pool = ThreadPoolExecutor(workers, f"offload-{name}", ask_for_short_slices)
        self._lock = threading.Lock()
        self._active = 0
        self._active_since_s = 0.0

    def submit(self, ticket: Ticket, work: Callable[[], int], size_bytes: int) -> None:
        self._pool.submit(self._transfer, ticket, work, size_bytes)

    def wait(self, ticket: Ticket) -> None:
        ticket.wait()

    def between(self, first: int, last: int) -> list[Span]:
        with self._lock:
            return numbered(self.spans, self.meter.transfers, first, last)

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _transfer(self, ticket: Ticket, work: Callable[[], int], size_bytes: int) -> None:
        start_s = time.perf_counter()
        with self._lock:
            if self._active == 0:
                self._active_since_s = start_s
            self._active += 1
        ticket.run(work)
        end_s = time.perf_counter()
        with self._lock:
            self._active -= 1
            self.meter.moved_bytes += size_bytes
            self.meter.transfers += 1
            if self._active == 0:
                self.meter.busy_s += end_s - self._active_since_s
            self.spans.append((ticket.chunk, start_s, end_s, size_bytes))
