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

    ``accounted`` gives what the ledger knows of less what it has debited for the step to make.
    ``held_bytes``: the most in a watched step that was not others' before it; to be compared with
    the budget. The peak is the process's and is not reset, which would take it from the user: a
    step that stays below an earlier peak is not seen, but then it is no worse than what has been.
    """

    def __init__(self, accounted: Callable[[], int], device: torch.device) -> None:
        super().__init__(accounted)
        self.held_bytes = 0
        self._device = device
        self._before: int | None = None  # the peak when a watched step began; None: none is watched
        self._foreign = 0

    def start(self) -> None:
        self._before = torch.cuda.max_memory_allocated(self._device)
        self._foreign = torch.cuda.memory_allocated(self._device) - self._accounted()

    def stop(self) -> None:
        before, self._before = self._before, None
        if before is None:
            return  # between watched steps the user, too, may make new peaks
        most = torch.cuda.max_memory_allocated(self._device)
        if most > before:
            self.held_bytes = max(self.held_bytes, most - self._foreign)


def _sample(watch: weakref.ref[Watch], stop: threading.Event) -> None:
    while not stop.wait(INTERVAL_S):
        there = watch()
        if there is None:
            return
        there.look()
        del there
