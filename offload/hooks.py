"""Hooks on modules, parameters and saved tensors: they turn what happens into engine calls."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offload.activations import KEEP_ALL, Means, Planned, find_units
from offload.bind import Binding, Home
from offload.callers import caller_of_hooks, refuse_transforms
from offload.calls import Call, call_of, entries, is_known
from offload.engine import Engine
from offload.errors import BudgetError
from offload.foresight import Foresight
from offload.gradients import GradientHomes
from offload.guard import AllocationGuard
from offload.homing import check_parameters
from offload.hook import Hook, has_user_hooks
from offload.passes import Before, Pass, Turn
from offload.prefetch.trace import Access, Need, Phase
from offload.results import Keeping
from offload.saved import Activations, SavedTensors
from offload.steps import Kind, Mode, Steps
from offload.tape import Mark
from offload.tiers.home import Backing

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
        self._grads = GradientHomes(
            model, engine, binding, on_grad, keeps, whose=threading.get_ident
        )
        self._shared = {c: home for home in self._grads.shared for c in home.weight_chunks}
        self._pass = Pass()
        self._together: Mode | None = None  # of the step that several inference passes make
        activations = Activations(self._take_activation, engine.ledger.give_other)
        self._saved = SavedTensors(
            engine.space.chunks_at, self._unpacked, activations, self._running
        )
        self.activations = Planned(
            engine, means, activations, self._saved, self._enter_again, has_user_hooks
        )
        self._own: dict[nn.Module, Callable[..., None]] = {}
        self._model = model
        self._units = find_units(model)
        self._foresight = Foresight(model, engine, binding)
        if means.setting == "keep":
            engine.outlook.step_bytes = self._foresight.step_bytes  # it knows of keeping alone
            if self._units:
                engine.outlook.remedy = REMEDY
            self._units = {}
        engine.trust.alone = lambda: self._pass.known and self._running()
        self._root = [
            model.register_forward_pre_hook(Hook(self._enter_root), prepend=True, with_kwargs=True),
            model.register_forward_hook(Hook(self._leave_root), always_call=True),
            *(h for name, part in entries(model).items() for h in self._entry(name, part)),
        ]
        self._inner = self._attach(model)

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
        for handle in (*self._root, *self._inner):
            handle.remove()
        self._root, self._inner = [], []
        self.activations.close()

    def _attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks on units and parameters; not there while everything fits."""
        handles: list[RemovableHandle] = []
        homes = self._binding.homes
        for name, module in model.named_modules():
            direct = [homes[p] for p in module.parameters(recurse=False) if p in homes]
            if isinstance(module, nn.Embedding):
                # A lookup touches a few rows: read where they lie, the table is not fetched.
                for c in (c for h in direct for c in h.weight_chunks):
                    self._engine.space.chunks[c].sparse = True
            elif direct:
                chunks = sorted({c for h in direct for c in h.weight_chunks})
                needs = tuple(Need(c, Access.READ) for c in chunks)
                enter = self._own[module] = self._unit(name, needs, direct)
                handles.append(module.register_forward_pre_hook(Hook(enter)))
        for name, unit in self._units.items():
            handles += self._planned(name, unit)
        for home in homes.values():
            if home.family.trained:
                before, after = self._gradient(home)
                handles.append(home.param.register_hook(Hook(before)))
                handles.append(home.param.register_post_accumulate_grad_hook(Hook(after)))
        return handles

    # -- forward ----------------------------------------------------------------------------

    def _entry(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        """Hooks on a part that users call by itself, in inference: ``generate`` does, an encoder.

        Its gradients, if it is to have any, are those of a pass without contexts: served on demand.
        """

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled() and not self._running():
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
        if self._relax(mode is Mode.FITS and self.activations.keeps_all):
            return
        if kind is Kind.TRAIN:
            self.activations.begin_pass(call.extent, len(self._units))
        self._engine.trust.hooks = has_user_hooks(self._model)
        self._pass.known = kind is Kind.INFER and is_known(self._model)
        if part:
            self._foresight.see_nothing()
        else:
            self._foresight.see(args, kwargs)
        self._pass.in_backward = False
        if kind is Kind.TRAIN:
            self._pass.push(torch.autograd.graph.saved_tensors_hooks(
                self._saved.pack, self._saved.unpack
            ))  # fmt: skip
        if mode is Mode.RECORD:
            self._pass.before = Before(self._model)
            self._pass.push(AllocationGuard(self._foresee, self._running))
        if kind is Kind.TRAIN and self.activations.keeps_parts:
            self._pass.push(Keeping(self._saved, self._running))

    def _decide(self) -> None:
        """Between steps: where activations are to be treated otherwise the step is recorded."""
        if self.activations.wants_another_record(self._steps.tracks[Kind.TRAIN].trace):
            self._steps.forget(Kind.TRAIN)

    def _relax(self, fits: bool) -> bool:
        """Take the inner hooks off while everything fits, and put them back when it may not."""
        if fits and self._inner:
            for handle in self._inner:
                handle.remove()
            self._inner = []
            # Gradients are then autograd's own tensors, in the room their homes leave.
            grads = [c for h in self._binding.homes.values() for c in h.grad_chunks]
            self._engine.evict([c for c in grads if self._engine.is_dead(c)])
            self._engine.space.pool.trim()
            self._fetch_all()
        elif not fits and not self._inner:
            self._inner = self._attach(self._model)
        return fits

    def _fetch_all(self) -> None:
        """Have all weights in memory: no hook will ask for what this form has not touched."""
        for c in sorted({c for h in self._binding.homes.values() for c in h.weight_chunks}):
            if self._engine.space.chunks[c].backing is Backing.FILE:
                self._engine.need(Phase.FORWARD, (Need(c, Access.READ),))

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

    def _planned(self, name: str, unit: nn.Module) -> list[RemovableHandle]:
        """Hooks that tell when a unit's forward runs, as close around it as there are."""

        def before(module: nn.Module, args: object, kwargs: object) -> None:
            if self._running():
                with self._undone_if_refused():
                    self.activations.before(name, module, args, kwargs)

        def after(module: nn.Module, args: object, output: object) -> None:
            with self._undone_if_refused():
                self.activations.after(output)

        return [
            unit.register_forward_pre_hook(Hook(before), with_kwargs=True),
            unit.register_forward_hook(Hook(after), prepend=True, always_call=True),
        ]

    def _enter_again(self, module: nn.Module) -> None:
        """A unit runs again within the backward pass."""
        self._pass.in_backward = True
        if module in self._own:
            self._own[module](module, ())

    def _unit(self, name: str, needs: tuple[Need, ...], homes: list[Home]) -> Callable[..., None]:
        def enter(module: nn.Module, args: object) -> None:
            phase = Phase.BACKWARD if self._pass.in_backward else Phase.FORWARD
            self._take_turns(needs, homes)
            if self._engine.tape is not None:
                again = self._pass.in_backward
                self._engine.tape.mark(Mark.RERUN if again else Mark.MODULE, name)
            with self._undone_if_refused():
                self._engine.need(phase, needs)

        return enter

    def _take_turns(self, needs: tuple[Need, ...], homes: list[Home]) -> None:
        """Let other passes catch up before weights are asked for that they may need too."""
        mine = self._pass
        if mine.turn is not None and mine.turn.infers == mine.infers:
            mine.turn.unit(needs, homes, in_backward=mine.in_backward)

    def _take_activation(self, size_bytes: int, what: str) -> None:
        with self._undone_if_refused():
            self._engine.take_other(size_bytes, what)

    @contextmanager
    def _undone_if_refused(self) -> Iterator[None]:
        """A refused forward pass leaves random state and buffers as they were."""
        try:
            yield
        except BudgetError:
            if self._pass.before is not None:
                self._pass.before.restore()
            raise

    def _foresee(self, size_bytes: int, operation: str) -> None:
        engine = self._engine
        with self._undone_if_refused():
            engine.make_room_for(size_bytes, f"the result of {operation}")
        if engine.recorder is not None:
            engine.recorder.see_other(engine.ledger.other_bytes + size_bytes)

    # -- backward ---------------------------------------------------------------------------

    def _unpacked(self, chunks: tuple[int, ...]) -> None:
        self._pass.in_backward = True
        needs = tuple(Need(c, Access.READ) for c in chunks)
        self._take_turns(needs, [])
        self._engine.need(Phase.BACKWARD, needs)
        for home in (self._shared.get(c) for c in chunks):
            if home is not None:
                self._grads.reached(home)

    def _gradient(self, home: Home) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(grad: Tensor) -> None:
            self._pass.in_backward = True
            if self._pass.turn is not None:
                self._pass.turn.gradient(home)
            self._grads.before(home, grad)

        def after(param: Tensor) -> None:
            self._grads.after(home)
            if self._pass.turn is not None:
                self._pass.turn.added(home)

        return before, after

    # -- contexts ---------------------------------------------------------------------------

    def _running(self) -> bool:
        """Whether the forward pass that pushed our contexts is on the stack.

        A KeyboardInterrupt skips module hooks; what it leaves behind must not act on others.
        """
        frame = inspect.currentframe()
        while frame is not None and frame is not self._pass.frame:
            frame = frame.f_back
        return frame is not None
