"""Passes side by side: each in a thread of its own, and only the thread that has the baton runs.

A pass hands the baton on where it is about to use other weights than before, so that all passes
go through a unit before the next is loaded, whatever model it is. See vertical.py (training) and
block.py (inference).
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from offload.bind import Home
from offload.prefetch.trace import Need


class Ended(BaseException):
    """Unwinds a pass."""


class Ring:
    """The baton: exactly one of ``count`` threads has it, or the caller has.

    ``given`` is told who gets it.
    """

    def __init__(self, count: int, given: Callable[[int], None] = lambda _: None) -> None:
        self.error: BaseException | None = None
        self.over = threading.Semaphore(0)
        self._go = [threading.Semaphore(0) for _ in range(count)]
        self._in = list(range(count))
        self._given = given

    @property
    def count(self) -> int:
        """How many passes there are in all."""
        return len(self._go)

    def begin(self) -> None:
        """The first one runs."""
        self._go[0].release()

    def await_turn(self, index: int) -> None:
        """Wait for the baton. Raises Ended when there is nothing more to do."""
        self._go[index].acquire()
        if self.error is not None:
            raise Ended
        self._given(index)

    def pass_on(self, index: int) -> None:
        """Let the others have their turns."""
        self.check()
        after = self._after(index)
        if after != index:
            self._go[after].release()
            self.await_turn(index)

    def check(self) -> None:
        """Raises Ended where a pass has failed; what else would be wrong, a subclass says."""
        if self.error is not None:
            raise Ended

    def fail(self, error: BaseException) -> None:
        """All others end at their next turn. The first error is the one to be seen."""
        if self.error is None:
            self.error = error

    def leave(self, index: int) -> None:
        """This one is over."""
        after = self._after(index)
        self._in.remove(index)
        (self._go[after] if self._in else self.over).release()

    def _after(self, index: int) -> int:
        return next((i for i in self._in if i > index), self._in[0])


class InRing:
    """One pass's place in a ring. What ``passes.Turn`` asks of passes without gradients."""

    infers = True

    def __init__(self, ring: Ring, index: int) -> None:
        self._ring = ring
        self._index = index
        self._last: tuple[Need, ...] = ()

    def unit(self, needs: tuple[Need, ...], homes: list[Home], *, in_backward: bool) -> None:
        """These weights are about to be used: where they are others than before, pass on."""
        if needs != self._last:
            self._last = needs
            self._ring.pass_on(self._index)

    def gradient(self, home: Home) -> None:
        """There is none."""

    def added(self, home: Home) -> None:
        """There is none."""


def run_in_turns(ring: Ring, works: Sequence[Callable[[], None]]) -> None:
    """Run all; an error is left in ``ring.error``. Every thread has ended when this returns.

    The caller's autocast, thread count and context variables hold in the threads; gradients are
    enabled in them.
    """
    mode = _caller_state()

    def body(index: int) -> None:
        try:
            ring.await_turn(index)
            with mode():
                works[index]()
        except Ended:
            pass
        except BaseException as error:
            ring.fail(error)
        finally:
            ring.leave(index)

    threads = []
    for index in range(len(works)):
        target = partial(contextvars.copy_context().run, body, index)
        name = f"offload-micro-batch-{index}"
        threads.append(threading.Thread(target=target, name=name, daemon=True))
    for thread in threads:
        thread.start()
    ring.begin()
    _await(ring)
    for thread in threads:
        thread.join()


def _await(ring: Ring) -> None:
    """Wait for all to be over; an interrupt ends them at their next turns."""
    while True:
        try:
            ring.over.acquire()
            return
        except BaseException as error:  # a KeyboardInterrupt: this thread does nothing else
            ring.fail(error)


def _caller_state() -> Callable[[], Any]:
    """A context that gives another thread the autocast of this one, with gradients."""
    device = "cpu"
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    caches, threads = torch.is_autocast_cache_enabled(), torch.get_num_threads()

    @contextmanager
    def state() -> Iterator[None]:
        torch.set_num_threads(threads)  # else some kernels take the default in a new thread
        with torch.enable_grad(), torch.autocast(device, dtype, enabled, caches):
            yield

    return state
