"""Gradient accumulation in vertical order: all micro-batches pass a unit before the next is loaded.

Each micro-batch runs in a thread of its own, so any model will do; but only the thread that has
the baton runs. It hands the baton on where it is about to use other weights than before, and in
its next turn goes on without asking again: passes of one shape advance in step, others drift and
are right all the same. Two rules give the bits of the plain loop: no backward pass begins before
every forward pass has ended, and a gradient is added to a parameter only when all earlier
micro-batches have added theirs or are over.

What cannot be exact so is run as the plain loop, and that is said once: forward passes that draw
random numbers (their order would change), and reentrant checkpointing of a weight that is used
twice (its gradient is added in two parts); so is what does not fit. It is found out before any
gradient is touched.

"Vertical" and "horizontal" are GreedySnake's words for the two orders.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from offload.bind import Home
from offload.errors import BudgetError, OffloadError
from offload.hooks import Hooks
from offload.parts import Parts
from offload.passes import Before
from offload.prefetch.trace import Need
from offload.ring import InRing, Ring, run_in_turns
from offload.steps import Kind
from offload.tiers.spec import format_size
from offload.track import Mode

B = TypeVar("B")
Work = Callable[[], Tensor]


class Accumulator:
    """``runtime.accumulate``: several micro-batches, vertically where that is exact.

    ``loss_fn(model, micro_batch)`` returns the loss, a tensor of one element, weighted as it
    should enter the gradient. It may call the model several times. It runs in another thread:
    the caller's grad mode and CPU autocast hold there, other contexts (dispatch and function
    modes, saved-tensor hooks) must be entered in ``loss_fn``. It is called again for all
    micro-batches when the forward passes turn out to draw random numbers, or to need more room
    than there is.

    Activations of all micro-batches exist at once, and so do their gradients of tied weights
    until the last use is reached. Where the budget does not hold the activations, the plain loop
    is run. Raises BudgetError as that does, or where only the backward pass finds too little room,
    and whatever ``loss_fn`` or the backward pass raises, with no thread left.
    """

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self._model = model
        self._parts = parts
        self._declined = False

    def __call__(
        self, micro_batches: Iterable[B], loss_fn: Callable[[nn.Module, B], Tensor]
    ) -> list[Tensor]:
        """The losses, detached; gradients are in the parameters."""
        works: list[Work] = [partial(loss_fn, self._model, batch) for batch in micro_batches]
        hooks = self._parts.hooks
        if hooks is None:
            raise OffloadError("accumulate(): this run is closed")
        if not isinstance(hooks, Hooks):
            self._decline("weights are computed with in frames (device or compute_dtype)")
        if self._parts.means.setting != "keep":
            self._decline(f'activations="{self._parts.means.setting}" is for one pass at a time')
        if self._declined or len(works) < 2 or not self._worth_it():
            return self._plain(works)
        assert isinstance(hooks, Hooks)
        before = Before(self._model)
        with self._holding() as hold:
            ring = _Ring(len(works), hold, self._lacking_bytes)
            losses = _run(ring, hooks, works)
        error, ring.error = ring.error, None  # no cycle: its traceback holds activations
        if error is not None and not ring.in_backward:
            before.restore()
        if isinstance(error, BudgetError) and not ring.in_backward:
            error = _Unsuitable(f"activations of {len(works)} micro-batches do not fit: {error}")
        if isinstance(error, _Unsuitable):
            self._decline(str(error))
            del error
            return self._plain(works)
        try:
            if error is not None:
                raise error
        finally:
            del error
        if ring.random_moved:
            raise OffloadError(
                "accumulate(): the backward pass drew random numbers, for the micro-batches in "
                "turn: bits differ from the plain loop's. Use that; zero_grad() these gradients"
            )
        return losses

    def _worth_it(self) -> bool:
        """Whether weights move at all."""
        fits = self._parts.steps.tracks[Kind.TRAIN].mode is Mode.FITS
        on_disk = self._parts.engine.space.disk is not None
        return torch.is_grad_enabled() and on_disk and not fits

    def _lacking_bytes(self) -> int:
        """With all activations there: what the largest gradient, made and at home, lacks of room.

        Gradients of tied weights that wait are not foreseen: activations go while they come.
        """
        engine = self._parts.engine
        needed_bytes = engine.ledger.other_bytes + 2 * engine.outlook.largest_gradient_bytes
        return needed_bytes - engine.ledger.capacity_bytes

    def _decline(self, why: str) -> None:
        if not self._declined:
            print(f"offload: accumulate() runs the plain loop: {why}", file=sys.stderr)
        self._declined = True

    def _plain(self, works: list[Work]) -> list[Tensor]:
        """One after the other; with ``step_in_backward`` only the last one updates."""
        losses = []
        early = self._parts.early
        for i, work in enumerate(works):
            loss = work()
            goes_on = early is not None and i < len(works) - 1
            with early.paused() if early is not None and goes_on else nullcontext():
                loss.backward()
            losses.append(loss.detach())
        return losses

    @contextmanager
    def _holding(self) -> Iterator[Callable[[bool], None]]:
        """With ``step_in_backward``: a switch that keeps all but the last pass from updating."""
        early = self._parts.early
        if early is None:
            yield lambda _: None
            return
        with early.paused():
            yield lambda held: early.hold(held=held)


class _Unsuitable(Exception):  # noqa: N818 (says what it is)
    """The vertical order would change bits, and no gradient has been touched."""


class _Ring(Ring):
    """The baton of training passes: all forward passes end before a backward pass begins."""

    def __init__(
        self, count: int, hold: Callable[[bool], None], lacking_bytes: Callable[[], int]
    ) -> None:
        super().__init__(count, lambda index: hold(index != count - 1))
        self.in_backward = False
        self._met = 0
        self._lacking_bytes = lacking_bytes
        self._random = _random_state()

    def meet(self, index: int) -> None:
        """Wait until all are here; the first one goes on first."""
        self.check()
        self._met += 1
        while self._met < self.count:
            self.pass_on(index)
        if not self.in_backward and self._lacking_bytes() > 0:
            raise _Unsuitable(
                f"beside the activations of {self._met} micro-batches the backward pass has no "
                f"room: give {format_size(self._lacking_bytes())} more host_memory"
            )
        if not self.in_backward and index != 0:
            self.pass_on(index)
        self.in_backward = True

    def check(self) -> None:
        """Raises Ended, or _Unsuitable once a forward pass has drawn random numbers."""
        super().check()
        if not self.in_backward and self.random_moved:
            raise _Unsuitable(
                "the forward pass draws random numbers (dropout?), each micro-batch in its turn"
            )

    @property
    def random_moved(self) -> bool:
        """Whether numbers were drawn since the beginning."""
        now = _random_state()
        return not torch.equal(self._random[0], now[0]) or self._random[1] != now[1]


class _Turn(InRing):
    """One micro-batch's place in the ring. Implements ``passes.Turn``."""

    infers = False  # an evaluation within it is no pass of the ring

    def __init__(self, ring: _Ring, index: int, earlier: list[_Turn]) -> None:
        super().__init__(ring, index)
        self.over = False
        self.has: set[Home] = set()  # parameters whose gradient it has added
        self._earlier = earlier
        self._hidden: dict[Home, bool] = {}  # parameters used; whether the graph sees the use

    def unit(self, needs: tuple[Need, ...], homes: list[Home], *, in_backward: bool) -> None:
        """Other weights than before are about to be used."""
        if not in_backward:
            self._check(homes)
        super().unit(needs, homes, in_backward=in_backward)

    def gradient(self, home: Home) -> None:
        """Wait until it is this micro-batch's turn to add its gradient."""
        if home in self.has:
            raise OffloadError(
                f"accumulate(): {home.name} received two gradients in one backward pass (reentrant "
                "checkpointing of a shared weight?), whose order would change bits; use the plain "
                "loop. Gradients are incomplete: zero_grad() them"
            )
        while not all(turn.over or home in turn.has for turn in self._earlier):
            self._ring.pass_on(self._index)

    def added(self, home: Home) -> None:
        """It is added."""
        self.has.add(home)

    def _check(self, homes: list[Home]) -> None:
        hidden = not torch.is_grad_enabled()
        for home in homes:
            if hidden + self._hidden.get(home, 0) and home in self._hidden:
                raise _Unsuitable(f"reentrant checkpointing of {home.name}, which is used twice")
            self._hidden[home] = hidden


def _run(ring: _Ring, hooks: Hooks, works: list[Work]) -> list[Tensor]:
    """All passes; errors are left in the ring. Every thread has ended when this returns."""
    losses: dict[int, Tensor] = {}
    turns = list[_Turn]()
    for index in range(len(works)):
        turns.append(_Turn(ring, index, turns[:]))

    def work(index: int) -> None:
        turn = turns[index]
        try:
            with hooks.taking_turns(turn):
                loss = works[index]()
                losses[index] = loss.detach()
                ring.meet(index)
                loss.backward()
        finally:
            turn.over = True

    run_in_turns(ring, [partial(work, index) for index in range(len(works))])
    return [losses[i] for i in sorted(losses)]


def _random_state() -> tuple[Tensor, object]:
    return torch.get_rng_state(), random.getstate()
