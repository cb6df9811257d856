"""How much memory the process holds beyond what the ledger accounts for: kernels' temporaries."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial

import torch

from offload.heap import anonymous_bytes

INTERVAL_S = 0.005


class Watch:
    """Samples a recorded step from a thread; ``excess_bytes`` is the most seen over the ledger.

    ``accounted`` gives the bytes the ledger knows of. What the process held when the watch was
    made, less that, is the interpreter and its libraries, and is not counted.
    """

    def __init__(self, accounted: Callable[[], int]) -> None:
        self.excess_bytes = 0
        self._accounted = accounted
        self._baseline = anonymous_bytes() - accounted()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample, unless already sampling."""
        if self._thread is None:
            self._stop.clear()
            # The thread does not keep a run alive that its user has dropped in mid-step.
            work = partial(_sample, weakref.ref(self), self._stop)
            self._thread = threading.Thread(target=work, daemon=True, name="offload-watch")
            self._thread.start()

    def stop(self) -> None:
        """End sampling."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def look(self) -> None:
        """One sample."""
        excess = anonymous_bytes() - self._accounted() - self._baseline
        self.excess_bytes = max(self.excess_bytes, excess)


class AllocatorWatch(Watch):
    """The same for a CUDA device, from the peak that torch's allocator knows of.

    The peak is the process's and is not reset, which would take it from the user: a step that stays
    below an earlier peak is not seen, but then it is no worse than what has been seen.
    """

    def __init__(self, accounted: Callable[[], int], peak: Callable[[], int],
                 device: torch.device) -> None:  # fmt: skip
        super().__init__(accounted)
        self._peak = peak
        self._device = device
        self._before = self._foreign = 0

    def start(self) -> None:
        self._before = torch.cuda.max_memory_allocated(self._device)
        self._foreign = torch.cuda.memory_allocated(self._device) - self._accounted()

    def stop(self) -> None:
        most = torch.cuda.max_memory_allocated(self._device)
        if most > self._before:
            excess = most - self._foreign - self._peak()
            self.excess_bytes = max(self.excess_bytes, excess)
            self._before = most


def _sample(watch: weakref.ref[Watch], stop: threading.Event) -> None:
    while not stop.wait(INTERVAL_S):
        there = watch()
        if there is None:
            return
        there.look()
        del there
