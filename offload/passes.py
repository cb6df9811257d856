"""What belongs to one forward and backward pass. Each thread has its own: see vertical.py."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from offload.bind import Home
from offload.errors import BudgetError
from offload.prefetch.trace import Need


class Turn(Protocol):
    """Where a pass that is one of several side by side lets the others go on.

    ``infers``: whether the passes are without gradients; others within them take no turns.
    """

    infers: bool

    def unit(self, needs: tuple[Need, ...], homes: list[Home], *, in_backward: bool) -> None:
        """These weights are about to be used."""

    def gradient(self, home: Home) -> None:
        """A gradient is about to be added up."""

    def added(self, home: Home) -> None:
        """It has been."""


class Before:
    """What a forward pass changes and a refused one must not: random state and buffers."""

    def __init__(self, model: nn.Module) -> None:
        self._rng = torch.get_rng_state()
        self._buffers = [(b, b.detach().clone()) for b in model.buffers()]

    def restore(self) -> None:
        torch.set_rng_state(self._rng)
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)


class Begun(Protocol):
    """A pass that may have begun: then ``before`` is what it changes."""

    before: Before | None


@contextmanager
def undone_if_refused(begun: Begun) -> Iterator[None]:
    """A refused forward pass leaves random state and buffers as they were."""
    try:
        yield
    except BudgetError:
        if begun.before is not None:
            begun.before.restore()
        raise


def on_stack(entered: FrameType | None) -> bool:
    """Whether a call is still on this thread's stack.

    A KeyboardInterrupt skips module hooks; what it leaves behind must not act on others.
    """
    frame = inspect.currentframe() if entered is not None else None
    while frame is not None and frame is not entered:
        frame = frame.f_back
    return frame is not None


class Pass(threading.local):
    """State of the pass that this thread is in. ``turn``: set while several take turns."""

    def __init__(self) -> None:
        self.contexts: list[Any] = []
        self.frame: FrameType | None = None  # of the model's forward
        self.before: Before | None = None
        self.in_backward = False
        self.entry: nn.Module | None = None  # the module that was called
        self.infers = False  # a forward pass without gradients is on the stack
        self.known = False  # and no code of the user's is within it
        self.turn: Turn | None = None

    def push(self, context: Any) -> None:
        """Enter a context until ``leave``."""
        context.__enter__()
        self.contexts.append(context)

    def leave(self) -> None:
        """Exit the contexts of the forward pass."""
        self.before = self.frame = self.entry = None
        self.infers = self.known = False
        while self.contexts:
            self.contexts.pop().__exit__(None, None, None)

    def running(self) -> bool:
        """Whether the forward pass that pushed the contexts is on this thread's stack."""
        return on_stack(self.frame)
