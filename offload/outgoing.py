"""Gradients on their way from the device: sent at once, awaited where autograd adds them up.

A parameter's gradient is due on the host when autograd adds it to ``.grad``, which for a parameter
that was read once is the next thing that happens to it. On CUDA that is on another thread than the
one which queues the device's work, so the copy runs beside the rest of the backward pass. What
autograd would read earlier is delivered before it goes on: gradients that are summed with others
(tied weights, a weight that is read twice), that the user's own hooks see first, or of which
gradients are taken.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from offload.bind import Home
from offload.hook import Hook
from offload.tiers.copy import Copier
from offload.tiers.lane import Lane, Ticket


class Alive:
    """Lives as long as one node of the graph that leads to a parameter."""

    __slots__ = ("_ended", "_key")

    def __init__(self, key: tuple[int, bool], ended: deque[tuple[int, bool]]) -> None:
        self._key = key
        self._ended = ended

    def __del__(self) -> None:
        self._ended.append(self._key)  # on whichever thread


class Reads:
    """How often each parameter was read by graphs that still exist.

    What is read in a recomputation counts for itself: non-reentrant checkpointing never goes back
    through those nodes, and reentrant checkpointing in a backward pass of their own.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[int, bool]] = Counter()
        self._ended: deque[tuple[int, bool]] = deque()

    def note(self, param: nn.Parameter, *, again: bool) -> Alive:
        """A node is made; it must keep what this returns."""
        key = id(param), again
        self._counts[key] += 1
        return Alive(key, self._ended)

    def single(self, param: nn.Parameter) -> bool:
        """Whether no other gradient of this parameter can be summed with one that is there."""
        while self._ended:
            self._counts[self._ended.popleft()] -= 1
        return all(self._counts[id(param), again] <= 1 for again in (False, True))


@dataclass(slots=True)
class _Sent:
    """A gradient that has left. ``grad``: it stays until its bytes have been copied.

    ``thread``: which computes, and goes on computing while others wait.
    """

    ticket: Ticket
    grad: Tensor
    thread: int
    start_s: float
    end_s: float = 0.0


class Outgoing:
    """Sends gradients through a lane. Methods are called under the lock of the hooks, but for
    ``wait``, which any thread may call without it. ``waited`` is told (cause, chunk, since when) of
    waiting that holds the computing up. ``home_of``: those that are
    pinned, where gradients go straight.
    """

    def __init__(
        self, copier: Copier, lane: Lane, waited: Callable[[str, int, float], None],
        home_of: Callable[[nn.Parameter], Home | None],
    ) -> None:  # fmt: skip
        self.lane = lane
        self.sent_bytes = 0  # on their way: they still take device memory
        self._copier = copier
        self._waited = waited
        self._home_of = home_of
        self._sent: dict[nn.Parameter, _Sent] = {}
        self._over: deque[_Sent] = deque()
        self._lock = threading.Lock()

    def may_send(self, param: nn.Parameter, grad: Tensor, reads: Reads) -> bool:
        """Whether nobody looks at this gradient before ``wait`` is called for it."""
        hooks = (param._backward_hooks or {}).values()
        return (
            reads.single(param)
            and param not in self._sent
            and grad.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.is_anomaly_enabled()
            and all(isinstance(hook, Hook) for hook in hooks)
        )

    def send(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        """What the gradient will be on the host, as the parameter wants it; its bytes come later.

        Only a worker may write to it until ``wait``; nobody may read it.
        """
        there = self._place(param, grad)
        sent = _Sent(Ticket(-1), grad, threading.get_ident(), time.perf_counter())
        mark = self._copier.ready()
        # A view of `there` itself would be one more reference, for which autograd copies it.
        source, target = grad.detach().view(-1), there.detach().view(-1)

        def move() -> int:
            try:
                self._copier.download(source, target, mark)
            finally:
                sent.end_s = time.perf_counter()
            return 0

        with self._lock:
            self._sent[param] = sent
        self.sent_bytes += grad.nbytes
        self.lane.submit(sent.ticket, move, grad.nbytes)
        return there

    def wait(self, param: nn.Parameter) -> None:
        """Wait until a gradient that was sent is there. Raises what the copy raised."""
        self._wait(param, holds_up=False)

    def wait_all(self) -> None:
        """Wait for all of them, even if nobody asks for them any more."""
        for param in list(self._sent):
            self._wait(param, holds_up=True)

    def abandon_all(self) -> None:
        """Wait until none is on its way. Nobody wants them, nor what their copies raised."""
        for param in list(self._sent):
            with contextlib.suppress(Exception):
                self._wait(param, holds_up=True)

    def over(self) -> list[tuple[float, float, int]]:
        """Copies that have been awaited since the last call: start, end, bytes on the device."""
        found = []
        while self._over:
            sent = self._over.popleft()
            self.sent_bytes -= sent.grad.nbytes
            found.append((sent.start_s, sent.end_s, sent.grad.nbytes))
        return found

    def _place(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        """Its home, where the device can write to that and nobody reads it; else memory."""
        home = self._home_of(param)
        if home is not None and home.takes(grad):
            there = home.new_grad()
            if self._copier.is_pinned(there):
                return there
        return torch.empty(grad.shape, dtype=param.dtype, device=param.device)

    def _wait(self, param: nn.Parameter, *, holds_up: bool) -> None:
        with self._lock:
            sent = self._sent.pop(param, None)
        if sent is None:
            return
        start_s = time.perf_counter()
        try:
            self.lane.wait(sent.ticket)
        finally:
            self._over.append(sent)
            if holds_up or sent.thread == threading.get_ident():
                self._waited("download", -1, start_s)
