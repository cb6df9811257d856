"""What belongs to a pass through a model whose weights are in frames.

[Note: two threads]
On CUDA autograd runs the device's nodes on a thread of its own, while gradients that have reached
the host are added up on the thread that called ``backward``. Both come here: one lock serialises
everything that touches residency.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn

from offload.passes import Before, on_stack, undone_if_refused


class FramedPass:
    """What is under way: a forward pass, a backward pass, and the contexts they run in."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.frame: FrameType | None = None  # of the model's call, while it is on the stack
        self.entry: nn.Module | None = None  # that was called
        self.backward = False
        self.contexts: list[Any] = []
        self.before: Before | None = None
        self.watched = False  # its step is the one that is recorded on demand
        self._depth = 0  # above 0: our own code runs, whose frames are debited otherwise
        self._rerunning: int | None = None  # the thread on which a unit runs again

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One thread at a time; a refused forward pass leaves random state and buffers alone."""
        with self.lock:
            self._depth += 1
            try:
                with undone_if_refused(self):
                    yield
            finally:
                self._depth -= 1

    @contextmanager
    def rerunning(self) -> Iterator[None]:
        """A unit runs again on this thread, whether or not with gradients."""
        before, self._rerunning = self._rerunning, threading.get_ident()
        try:
            yield
        finally:
            self._rerunning = before

    def reruns(self) -> bool:
        """Whether a unit runs again on this thread."""
        return self._rerunning == threading.get_ident()

    def ours(self) -> bool:
        """Whether it is our own code that runs operations."""
        return self._depth > 0

    def computing(self) -> bool:
        """Whether it is the model's forward that allocates."""
        return not self._depth and self.running()

    def running(self) -> bool:
        """Whether the model's forward is on this thread's stack."""
        return on_stack(self.frame)

    def push(self, context: Any) -> None:
        """Enter a context until ``leave``."""
        context.__enter__()
        self.contexts.append(context)

    def leave(self) -> None:
        """Exit the contexts of the forward pass."""
        self.before = None
        while self.contexts:
            self.contexts.pop().__exit__(None, None, None)


class DeviceBefore(Before):
    """With the device's random state."""

    def __init__(self, model: nn.Module, place: torch.device) -> None:
        super().__init__(model)
        self._place = place
        self._device_rng = torch.cuda.get_rng_state(place) if place.type == "cuda" else None

    def restore(self) -> None:
        super().restore()
        if self._device_rng is not None:
            torch.cuda.set_rng_state(self._device_rng, self._place)
