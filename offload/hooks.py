"""Hooks on modules, parameters and saved tensors: they turn what happens into engine calls.

Copies and pickles of a hooked model carry inert hooks: a deep copy is a plain model.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from offload.bind import Binding, Home
from offload.callers import caller_of_hooks, refuse_transforms
from offload.engine import Engine
from offload.errors import BudgetError
from offload.foresight import Foresight
from offload.gradients import GradientHomes
from offload.guard import AllocationGuard
from offload.homing import check_parameters
from offload.passes import Before, Pass, Turn
from offload.prefetch.trace import Access, Need, Phase
from offload.saved import Activations, SavedTensors
from offload.steps import Kind, Mode, Steps


def inert(*_: object) -> None:
    """What a hook becomes in a copy."""


class Hook:
    """A callable that does not survive copying: copies do nothing."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> str | tuple[Any, ...]:
        return _make_inert, ()


def _make_inert() -> Callable[..., None]:
    return inert


class Hooks:
    """All hooks of one wrapped model, for homes at fixed addresses (the CPU path)."""

    def __init__(
        self, model: nn.Module, engine: Engine, binding: Binding, steps: Steps,
        on_grad: Callable[[nn.Parameter], None] | None = None,
        keeps: Callable[[Home], bool] = lambda _: False,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._binding = binding
        self._steps = steps
        self._grads = GradientHomes(model, engine, binding, on_grad, keeps)
        self._shared = {c: home for home in self._grads.shared for c in home.weight_chunks}
        self._pass = Pass(engine)
        activations = Activations(self._take_activation, engine.ledger.give_other)
        self._saved = SavedTensors(
            engine.space.chunks_at, self._unpacked, activations, self._running
        )
        self._largest_input = 0
        self._foresight = Foresight(model, engine, binding)
        engine.foresee_step_bytes = self._foresight.step_bytes
        self._root = [
            model.register_forward_pre_hook(Hook(self._enter_root), prepend=True, with_kwargs=True),
            model.register_forward_hook(Hook(self._leave_root), always_call=True),
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
            self._pass.in_flight.clear()

    def remove(self) -> None:
        """Detach everything."""
        self._pass.leave()
        for handle in (*self._root, *self._inner):
            handle.remove()
        self._root, self._inner = [], []

    def _attach(self, model: nn.Module) -> list[RemovableHandle]:
        """Hooks on units and parameters; not there while everything fits."""
        handles: list[RemovableHandle] = []
        homes = self._binding.homes
        for module in model.modules():
            direct = [homes[p] for p in module.parameters(recurse=False) if p in homes]
            if isinstance(module, nn.Embedding):
                # A lookup touches a few rows: read where they lie, the table is not fetched.
                for c in (c for h in direct for c in h.weight_chunks):
                    self._engine.space.chunks[c].sparse = True
            elif direct:
                chunks = sorted({c for h in direct for c in h.weight_chunks})
                needs = tuple(Need(c, Access.READ) for c in chunks)
                handles.append(module.register_forward_pre_hook(Hook(self._unit(needs, direct))))
        for home in homes.values():
            if home.family.trained:
                before, after = self._gradient(home)
                handles.append(home.param.register_hook(Hook(before)))
                handles.append(home.param.register_post_accumulate_grad_hook(Hook(after)))
        return handles

    # -- forward ----------------------------------------------------------------------------

    def _enter_root(self, module: nn.Module, args: object, kwargs: object) -> None:
        refuse_transforms()
        self._pass.leave()  # an interrupt may have skipped the last leave
        self._pass.in_flight.clear()  # nor is a backward pass under way: it may have been cut short
        check_parameters(module, self._binding)
        kind = Kind.TRAIN if torch.is_grad_enabled() else Kind.INFER
        elements = sum(x.numel() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        mode = self._steps.begin(kind)
        if mode is Mode.FITS and elements > self._largest_input:
            mode = Mode.RECORD  # what fitted was a smaller input: watch this one
        self._largest_input = max(self._largest_input, elements)
        if self._relax(module, mode is Mode.FITS):
            return
        self._engine.user_hooks = has_user_hooks(module)
        self._foresight.see(args, kwargs)
        self._pass.in_backward = False
        self._pass.frame = caller_of_hooks()
        self._pass.infers = kind is Kind.INFER
        if kind is Kind.TRAIN:
            self._pass.push(torch.autograd.graph.saved_tensors_hooks(
                self._saved.pack, self._saved.unpack
            ))  # fmt: skip
        if mode is Mode.RECORD:
            self._pass.before = Before(module)
            self._pass.push(AllocationGuard(self._foresee, self._running))

    def _relax(self, module: nn.Module, fits: bool) -> bool:
        """Take the inner hooks off while everything fits, and put them back when it may not."""
        if fits and self._inner:
            for handle in self._inner:
                handle.remove()
            self._inner = []
            # Gradients are then autograd's own tensors, in the room their homes leave.
            grads = [c for h in self._binding.homes.values() for c in h.grad_chunks]
            self._engine.evict([c for c in grads if self._engine.is_dead(c)])
            self._engine.space.pool.trim()
        elif not fits and not self._inner:
            self._inner = self._attach(module)
        return fits

    def _leave_root(self, module: nn.Module, args: object, output: object) -> None:
        self._pass.leave()
        if sys.exc_info()[0] is not None:
            return  # the forward pass raised: its error is the one to be seen
        if self._steps.current is Kind.INFER:
            self._steps.end()
        else:
            self._engine.leave_forward()

    def _unit(self, needs: tuple[Need, ...], homes: list[Home]) -> Callable[..., None]:
        def enter(module: nn.Module, args: object) -> None:
            phase = Phase.BACKWARD if self._pass.in_backward else Phase.FORWARD
            self._take_turns(needs, homes)
            with self._undone_if_refused():
                self._engine.need(phase, needs)

        return enter

    def _take_turns(self, needs: tuple[Need, ...], homes: list[Home]) -> None:
        """Let other passes catch up before weights are asked for that they may need too."""
        mine = self._pass
        if mine.turn is not None and not mine.infers:
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
                self._grads.reached(home, self._pass.in_flight)

    def _gradient(self, home: Home) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(grad: Tensor) -> None:
            self._pass.in_backward = True
            if self._pass.turn is not None:
                self._pass.turn.gradient(home)
            self._grads.before(home, grad, self._pass.in_flight)

        def after(param: Tensor) -> None:
            self._grads.after(home, self._pass.in_flight)
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


def has_user_hooks(model: nn.Module) -> bool:
    """Whether code of the user's runs within passes: hooks on modules or parameters."""
    of_modules = (
        hooks
        for m in model.modules()
        for hooks in (
            m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks
        )
    )  # fmt: skip
    of_params = (
        hooks or {}
        for p in model.parameters()
        for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)
    )
    return any(
        not isinstance(hook, Hook)
        for hooks in chain(of_modules, of_params)
        for hook in hooks.values()
    )
