"""Threads of OpenMP spin for a shorter time while chunks move.

Between two operations the threads of GNU OpenMP, torch's on Linux, wait for the next by spinning,
for some milliseconds. When the loop waits for a chunk, or moves pages, they keep from the cores
those who read, write and take checksums. How long they spin is ``GOMP_SPINCOUNT``, which is read as
the library starts; nobody can tell it later. But while it manages more threads than there are
processors, they spin for 1,000 turns instead of 300,000 (its manual, at that variable). A parked
thread that once ran a parallel loop has a team of its own, and with that there are more. Steps in
which the disk has no part would take longer for it (docs/log.md): it is parked only while there is
something to move. Other builds of OpenMP do not care.
"""

from __future__ import annotations

import os
import threading
import weakref

import torch

_GRAIN = 1 << 15  # elements: torch gives no thread less of a loop
_SAID = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # the user has decided


class ShortSpins:
    """Parks a thread or lets it go. Nothing where the environment says how long to spin."""

    def __init__(self) -> None:
        self._over: threading.Event | None = None

    @property
    def on(self) -> bool:
        """Whether a thread is parked."""
        return self._over is not None

    def want(self, wanted: bool) -> None:
        """From now on, or no longer."""
        if wanted == self.on or (wanted and not _helps()):
            return
        if self._over is not None:
            self._over.set()
            self._over = None
            return
        over = self._over = threading.Event()
        weakref.finalize(self, over.set)  # a run that nobody closed
        threading.Thread(target=_park, args=(over,), name="offload-spins", daemon=True).start()


def _helps() -> bool:
    return torch.get_num_threads() > 1 and os.environ.keys().isdisjoint(_SAID)


def _park(over: threading.Event) -> None:
    torch.zeros(_GRAIN * torch.get_num_threads()).add_(1.0)  # a parallel loop
    over.wait()
