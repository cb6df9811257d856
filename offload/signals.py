"""Signals from within a pass: weights are about to be used, tensors are saved, gradients come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offload.activations import Means, Planned, ways_at_home
from offload.bind import Binding, Home
from offload.engine import Engine
from offload.gradients import GradientHomes
from offload.hook import Hook, has_user_hooks
from offload.passes import Pass, undone_if_refused
from offload.prefetch.trace import Access, Need, Phase
from offload.saved import Activations, SavedTensors
from offload.site import Site
from offload.tape import Mark
from offload.tiers.home import Backing

HOST = torch.device("cpu")


class Signals:
    """Hooks on the parts of one model, which turn what happens within a pass into engine calls.

    They come off while everything fits (``relax``). ``units``: the repeated blocks whose
    activations are treated as ``means`` says; none where all are kept.
    """

    def __init__(
        self, engine: Engine, binding: Binding, grads: GradientHomes, here: Pass,
        units: dict[str, nn.Module], means: Means,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._binding = binding
        self._grads = grads
        self._shared = {c: home for home in grads.shared for c in home.weight_chunks}
        self._pass = here
        self._units = units
        self._own: dict[nn.Module, Callable[..., None]] = {}
        self._handles: list[RemovableHandle] = []
        activations = Activations(self._take_activation, engine.ledger.give_other)
        self.saved = SavedTensors(engine.space.chunks_at, self._unpacked, activations, here.running)
        site = Site(activations, self.saved, HOST, self._again, has_user_hooks)
        self.activations = Planned(engine, ways_at_home(engine, means), site)

    def attach(self, model: nn.Module) -> None:
        """Put hooks on units and parameters."""
        homes, handles = self._binding.homes, self._handles
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

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def relax(self, model: nn.Module, *, fits: bool) -> bool:
        """Take the hooks off while everything fits, and put them back when it may not."""
        if fits and self._handles:
            self.remove()
            # Gradients are then autograd's own tensors, in the room their homes leave.
            grads = [c for h in self._binding.homes.values() for c in h.grad_chunks]
            self._engine.evict([c for c in grads if self._engine.moves.is_dead(c)])
            self._engine.space.pool.trim()
            self._fetch_all()
        elif not fits and not self._handles:
            self.attach(model)
        return fits

    def _fetch_all(self) -> None:
        """Have all weights in memory: no hook will ask for what this form has not touched."""
        for c in sorted({c for h in self._binding.homes.values() for c in h.weight_chunks}):
            if self._engine.space.chunks[c].backing is Backing.FILE:
                self._engine.need(Phase.FORWARD, (Need(c, Access.READ),))

    def begin_pass(self, elements: int) -> None:
        """A forward pass with gradients begins, over so many elements of input."""
        self.activations.begin_pass(elements, len(self._units))

    # -- forward ----------------------------------------------------------------------------

    def _planned(self, name: str, unit: nn.Module) -> list[RemovableHandle]:
        """Hooks that tell when a unit's forward runs, as close around it as there are."""

        def before(module: nn.Module, args: object, kwargs: object) -> None:
            if self._pass.running():
                with undone_if_refused(self._pass):
                    self.activations.before(name, module, args, kwargs)

        def after(module: nn.Module, args: object, output: object) -> None:
            with undone_if_refused(self._pass):
                self.activations.after(output)

        return [
            unit.register_forward_pre_hook(Hook(before), with_kwargs=True),
            unit.register_forward_hook(Hook(after), prepend=True, always_call=True),
        ]

    @contextmanager
    def _again(self, module: nn.Module) -> Iterator[None]:
        """A unit runs again within the backward pass."""
        self._pass.in_backward = True
        if module in self._own:
            self._own[module](module, ())
        yield

    def _unit(self, name: str, needs: tuple[Need, ...], homes: list[Home]) -> Callable[..., None]:
        def enter(module: nn.Module, args: object) -> None:
            phase = Phase.BACKWARD if self._pass.in_backward else Phase.FORWARD
            self._take_turns(needs, homes)
            if self._engine.tape is not None:
                again = self._pass.in_backward
                self._engine.tape.mark(Mark.RERUN if again else Mark.MODULE, name)
            with undone_if_refused(self._pass):
                self._engine.need(phase, needs)

        return enter

    def _take_turns(self, needs: tuple[Need, ...], homes: list[Home]) -> None:
        """Let other passes catch up before weights are asked for that they may need too."""
        mine = self._pass
        if mine.turn is not None and mine.turn.infers == mine.infers:
            mine.turn.unit(needs, homes, in_backward=mine.in_backward)

    def _take_activation(self, size_bytes: int, what: str) -> None:
        with undone_if_refused(self._pass):
            self._engine.take_other(size_bytes, what)

    def foresee(self, size_bytes: int, operation: str) -> None:
        """An operation is about to allocate this."""
        engine = self._engine
        with undone_if_refused(self._pass):
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
