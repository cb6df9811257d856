"""Where a pass of the model begins and ends: how its step is run, and what watches it meanwhile.

What happens in between reaches the engine through `offload.signals`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from offload.activations import KEEP_ALL, Means, Planned, find_units
from offload.bind import Binding, Home
from offload.callers import caller_of_hooks, refuse_transforms
from offload.calls import Call, call_of, entries, is_known_but_for_hooks
from offload.engine import Engine
from offload.foresight import Foresight
from offload.gradients import GradientHomes
from offload.guard import AllocationGuard
from offload.homing import check_parameters
from offload.hook import Hook, has_user_hooks
from offload.passes import Before, Pass, Turn
from offload.results import Keeping
from offload.signals import Signals
from offload.steps import Kind, Steps
from offload.track import Mode

REMEDY = 'give offload.wrap activations="auto", or use a smaller batch or gradient checkpointing'


class Hooks:
    """All hooks of one wrapped model, for homes at fixed addresses (the CPU path)."""

    def __init__(
        self, model: nn.Module, engine: Engine, binding: Binding, steps: Steps,
        on_grad: Callable[[nn.Parameter], None] | None = None,
        keeps: Callable[[Home], bool] = lambda _: False,
        means: Means = KEEP_ALL,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._binding = binding
        self._steps = steps
        self._model = model
        self._grads = GradientHomes(
            model, engine, binding, on_grad, keeps, whose=threading.get_ident
        )
        self._pass = Pass()
        self._together: Mode | None = None  # of the step that several inference passes make
        self._foresight = Foresight(model, engine, binding)
        units = find_units(model)
        if means.setting == "keep":
            engine.outlook.step_bytes = self._foresight.step_bytes  # it knows of keeping alone
            if units:
                engine.outlook.remedy = REMEDY
            units = {}
        self._signals = Signals(engine, binding, self._grads, self._pass, units, means)
        engine.moves.trust.alone = lambda: self._pass.known and self._pass.running()
        self._root = [
            model.register_forward_pre_hook(Hook(self._enter_root), prepend=True, with_kwargs=True),
            model.register_forward_hook(Hook(self._leave_root), always_call=True),
            *(h for name, part in entries(model).items() for h in self._entry(name, part)),
        ]
        self._signals.attach(model)

    @property
    def activations(self) -> Planned:
        """What becomes of activations."""
        return self._signals.activations

    @contextmanager
    def taking_turns(self, turn: Turn) -> Iterator[None]:
        """This thread runs one of several passes; nothing of it is held afterwards."""
        self._pass.turn = turn
        try:
            yield
        finally:
            self._pass.turn = None
            self._pass.leave()
            self._grads.nothing_in_flight(only_mine=True)

    @contextmanager
    def one_step(self, call: Call) -> Iterator[None]:
        """Inference passes in here, in whatever thread, are one step: planned as this call."""
        self._together = self._steps.begin(Kind.INFER, call)
        try:
            yield
        except BaseException:
            self._together = None
            self._steps.end()
            self._steps.forget(Kind.INFER)  # half a step is no example
            raise
        self._together = None
        self._steps.end()

    def remove(self) -> None:
        """Detach everything."""
        self._pass.leave()
        for handle in self._root:
            handle.remove()
        self._root.clear()
        self._signals.remove()
        self.activations.close()

    # -- forward ----------------------------------------------------------------------------

    def _entry(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        """Hooks on a part that users call by itself, in inference: ``generate`` does, an encoder.

        Its gradients, if it is to have any, are those of a pass without contexts: served on demand.
        """

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled() and not self._pass.running():
                self._enter(name, module, args, kwargs)

        def leave(module: nn.Module, args: object, output: object) -> None:
            if self._pass.entry is module:
                self._leave_root(module, args, output)

        return [
            part.register_forward_pre_hook(Hook(enter), prepend=True, with_kwargs=True),
            part.register_forward_hook(Hook(leave), always_call=True),
        ]

    def _enter_root(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:  # fmt: skip
        self._enter("", module, args, kwargs)

    def _enter(
        self, part: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        refuse_transforms()
        self._pass.leave()  # an interrupt may have skipped the last leave
        # A backward pass may have been cut short.
        self._grads.nothing_in_flight(only_mine=self._pass.turn is not None)
        check_parameters(module, self._binding)
        kind = Kind.TRAIN if torch.is_grad_enabled() else Kind.INFER
        if kind is Kind.TRAIN and self._steps.current is None:
            self._decide()
        call = call_of(part, args, kwargs)
        mode = self._together or self._steps.begin(kind, call)
        self._pass.frame, self._pass.entry = caller_of_hooks(), module
        self._pass.infers = kind is Kind.INFER
        if self._signals.relax(self._model, fits=mode is Mode.FITS and self.activations.keeps_all):
            return
        if kind is Kind.TRAIN:
            self._signals.begin_pass(call.extent)
        hooked = self._engine.moves.trust.hooks = has_user_hooks(self._model)
        infers = kind is Kind.INFER and not hooked
        self._pass.known = infers and is_known_but_for_hooks(self._model)
        if part:
            self._foresight.see_nothing()
        else:
            self._foresight.see(args, kwargs)
        self._pass.in_backward = False
        if kind is Kind.TRAIN:
            self._pass.push(torch.autograd.graph.saved_tensors_hooks(
                self._signals.saved.pack, self._signals.saved.unpack
            ))  # fmt: skip
        if mode is Mode.RECORD:
            self._pass.before = Before(self._model)
            self._pass.push(AllocationGuard(self._signals.foresee, self._pass.running))
        if kind is Kind.TRAIN and self.activations.keeps_parts:
            self._pass.push(Keeping(self._signals.saved, self._pass.running))

    def _decide(self) -> None:
        """Between steps: where activations are to be treated otherwise the step is recorded."""
        if self.activations.wants_another_record(self._steps.tracks[Kind.TRAIN].trace):
            self._steps.forget(Kind.TRAIN)

    def _leave_root(self, module: nn.Module, args: object, output: object) -> None:
        self._pass.leave()
        if sys.exc_info()[0] is not None:
            return  # the forward pass raised: its error is the one to be seen
        if self._steps.current is Kind.INFER:
            if self._together is None:
                self._steps.end()
        else:
            self.activations.end_pass()
            self._engine.leave_forward()
