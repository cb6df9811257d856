"""Hooks for the framed path: weights are read from frames, gradients go to homes on the host."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offload.activations import KEEP_ALL, Means, Planned
from offload.bind import Binding, Home
from offload.callers import caller_of_hooks, refuse_transforms
from offload.calls import call_of, entries
from offload.device import frame_dtype
from offload.device_side import Device
from offload.engine import Engine
from offload.errors import OffloadError
from offload.framed_pass import DeviceBefore, FramedPass
from offload.framed_units import FramedUnits
from offload.gradients import GradientHomes, gradient_bytes
from offload.guard import AllocationGuard
from offload.homing import check_parameters
from offload.hook import Hook, has_user_hooks
from offload.internals import backward_runs, compiled, tree_map, when_backward_ends
from offload.outgoing import Reads
from offload.prefetch.trace import Phase
from offload.steps import Kind, Steps
from offload.swap_bus import ways_in_frames
from offload.tape import Mark
from offload.tiers.copy import deliver
from offload.track import Mode
from offload.use import Use, attach, detach


class DeviceHooks:
    """All hooks of one model whose weights are computed with in frames."""

    def __init__(
        self, model: nn.Module, engine: Engine, binding: Binding, steps: Steps, device: Device,
        on_grad: Callable[[nn.Parameter], None] | None = None,
        keeps: Callable[[Home], bool] = lambda _: False,
        means: Means = KEEP_ALL,
    ) -> None:  # fmt: skip
        self._binding = binding
        self._levels = (steps, device.steps)
        self._host = engine
        self._device = device
        self._grads = GradientHomes(model, engine, binding, on_grad, keeps)
        self._pass = FramedPass()
        self._reads = Reads()
        level = device.engine
        ways = ways_in_frames(engine, device, means)
        self._units = FramedUnits(model, device, ways, self._pass, self._enter_backward)
        level.outlook.largest_gradient_bytes = max(
            (c.size_bytes for c in level.frames.chunks), default=0
        )
        self._undo = ExitStack()
        self._model = model
        self._attach(model)

    def remove(self) -> None:
        """Detach everything; the model reads its parameters themselves again."""
        self._pass.leave()
        self._undo.close()

    @property
    def activations(self) -> Planned:
        """What becomes of activations."""
        return self._units.planned

    @property
    def _lock(self) -> AbstractContextManager[Any]:
        return self._pass.lock

    def _locked(self) -> AbstractContextManager[None]:
        return self._pass.locked()

    def _attach(self, model: nn.Module) -> None:
        undo = self._undo
        undo.callback(self._device.close)
        undo.callback(self._units.close)
        undo.callback(move_buffers, model, torch.device("cpu"))
        move_buffers(model, self._device.place)
        parts = {"": model} | entries(model)
        handles = [h for name, part in parts.items() for h in self._entry(name, part)]
        for home in self._binding.homes.values():
            if home.family.trained:
                before, after = self._gradient(home)
                handles.append(home.param.register_hook(Hook(before)))
                handles.append(home.param.register_post_accumulate_grad_hook(Hook(after)))
        for handle in handles:
            undo.callback(handle.remove)
        undo.callback(detach, model)
        attach(model, self._read)

    # -- forward ----------------------------------------------------------------------------

    def _entry(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        """Hooks on the model, and on a part that is called by itself: an encoder, by ``generate``.

        What is called within a pass belongs to that.
        """

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return self._enter(name, module, args, kwargs) if self._begins(module) else None

        def leave(module: nn.Module, args: object, output: object) -> None:
            if module is self._model or self._pass.entry is module:
                self._leave()

        return [
            part.register_forward_pre_hook(Hook(enter), prepend=True, with_kwargs=True),
            part.register_forward_hook(Hook(leave), always_call=True),
        ]

    def _begins(self, module: nn.Module) -> bool:
        """Whether a call of this module is a pass of its own."""
        if module is self._model or torch.compiler.is_compiling():  # that is refused
            return True
        return not (self._pass.reruns() or backward_runs() or self._pass.running())

    def _enter(self, part: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if compiled(module):
            raise OffloadError(COMPILED)
        refuse_transforms()
        if self._device.place.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise OffloadError(CAPTURED)
        if self._pass.backward and not backward_runs():
            await_autograd(self._device.place)  # not under the lock: it may want that
        with self._lock:
            self._device.engine.frames.pool.memory.follow()
            self._pass.leave()  # an interrupt may have skipped the last leave
            self._end_pass()
            self._pass.entry = module
            self._grads.nothing_in_flight()
            check_parameters(module, self._binding)
            self._host.moves.trust.hooks = has_user_hooks(self._model)
            self._device.engine.frames.scrutiny.careful = self._host.moves.trust.hooks
            kind = Kind.TRAIN if torch.is_grad_enabled() else Kind.INFER
            call = call_of(part, args, kwargs)
            if kind is Kind.TRAIN and self._levels[0].current is None:
                self._units.decide(self._levels)
            # What a part is given says nothing of what the model will be given.
            extent = call.extent if kind is Kind.TRAIN and not part else 0
            self._device.settle_residents(self._levels[0], extent)
            modes = [steps.begin(kind, call) for steps in self._levels]
            if kind is Kind.TRAIN:
                self._units.begin_pass(call.extent)
        units = self._units
        if kind is Kind.TRAIN and (modes[1] is not Mode.FITS or units.any):
            self._pass.push(torch.autograd.graph.saved_tensors_hooks(units.pack, units.unpack))
            self._pass.watched = modes[1] is Mode.RECORD
        if modes[1] is Mode.RECORD:
            self._pass.before = DeviceBefore(module, self._device.place)
            self._pass.push(AllocationGuard(self._foresee, self._pass.computing))
            self._device.engine.frames.scrutiny.watching = True
        if kind is Kind.TRAIN:
            units.show_results()
        self._pass.frame = caller_of_hooks()
        return self._moved(args, kwargs)

    def _leave(self) -> None:
        with self._lock:
            self._pass.leave()
            self._end_pass()
            if sys.exc_info()[0] is not None:
                return  # the forward pass raised: its error is the one to be seen
            if self._levels[0].current is Kind.INFER:
                for steps in self._levels:
                    steps.end()
            else:
                self._units.planned.end_pass()
                self._device.leave_forward()
                self._host.leave_forward()

    def _moved(self, args: Any, kwargs: Any) -> Any:
        """The model's inputs where and as they are computed with; None: as they are.

        Only containers of plain data are looked into: a cache object must stay the user's own.
        """
        place, dtype = self._device.place, self._device.dtype
        if place.type == "cpu" and dtype is None:
            return None

        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.to(place, dtype if x.is_floating_point() else None)

        def opaque(x: Any) -> bool:
            return not isinstance(x, list | tuple | dict)

        return tree_map(move, (args, kwargs), is_leaf=opaque)

    def _foresee(self, size_bytes: int, operation: str) -> None:
        with self._locked():
            self._device.engine.foresee(size_bytes, f"the result of {operation}")

    # -- weights ----------------------------------------------------------------------------

    def _read(self, param: nn.Parameter) -> Tensor:
        """What ``module.weight`` is: inside the model's forward and its recomputation, a Use."""
        if param in self._binding.residents:
            return self._read_resident(param)
        recomputes = self._pass.reruns() or (torch.is_grad_enabled() and backward_runs())
        if not (recomputes or self._pass.running()):
            return param
        home = self._binding.homes.get(param)
        if home is None:
            return param
        if param.data_ptr() != home.address or not param.numel():
            dtype = frame_dtype(param.dtype, self._device.dtype)
            view = param.detach().to(self._device.place, dtype)
        else:
            with self._locked():
                if self._host.tape is not None:
                    mark = Mark.RERUN if recomputes else Mark.MODULE
                    self._host.tape.mark(mark, home.name.rpartition(".")[0])
                if recomputes:
                    self._enter_backward()
                phase = Phase.BACKWARD if recomputes else Phase.FORWARD
                view = self._device.engine.serve(phase, param)
        if param.requires_grad and torch.is_grad_enabled():
            alive = self._reads.note(param, again=recomputes)
            return Use.apply(param, view, self._gradient_out, alive)  # type: ignore[no-any-return]
        return self._unrecorded(view, param)

    def _read_resident(self, param: nn.Parameter) -> Tensor:
        """Of a weight that lives on the device: itself, or converted to what is computed in."""
        residents = self._device.residents
        assert residents is not None
        recorded = param.requires_grad and torch.is_grad_enabled()
        with self._locked():
            residents.read(param, recorded=recorded)
        if not (self._pass.running() or self._pass.reruns() or backward_runs()):
            return param
        view = residents.value(param)
        if recorded and view is None:
            return param
        if recorded:
            return Use.apply(param, view, deliver_here, None)  # type: ignore[no-any-return]
        # Not noted as in use: an operation that runs while it goes home has what it began with.
        return self._unrecorded((param if view is None else view).detach(), param)

    def _unrecorded(self, view: Tensor, param: nn.Parameter) -> Tensor:
        """What is read where nothing is recorded: matmul chooses its kernel by whether gradients
        are required. Autocast keeps what it made of such a leaf until its context ends, and in
        there nothing else asks.
        """
        kept = torch.is_autocast_enabled(self._device.place.type)
        return view.requires_grad_(param.requires_grad and not kept)

    # -- backward ---------------------------------------------------------------------------

    def _enter_backward(self, *, computes: bool = True) -> None:
        """The first event of a backward pass: have autograd tell us when it ends."""
        if self._pass.backward or not backward_runs():
            return
        if computes:
            self._device.engine.frames.pool.memory.follow()
        self._device.end_pass()
        self._pass.backward = True
        when_backward_ends(self._leave_backward)

    def _leave_backward(self) -> None:
        with self._lock:
            self._pass.backward = False
            self._device.await_sent(self._host.tape)
            self._units.planned.poll()
            self._device.end_pass()
            self._host.settle()
            self._grads.nothing_in_flight()

    def _gradient_out(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        """A gradient leaves the device."""
        home = self._binding.homes[param]
        with self._lock:
            self._enter_backward()
            if self._may_send(home, grad):
                self._device.engine.take_other(grad.nbytes, f"the gradient of {home.name}")
                self._grads.comes(home)
                assert self._device.outgoing is not None
                return self._device.outgoing.send(param, grad)
            self._device.engine.pass_through(grad.nbytes, f"the gradient of {home.name}")
            self._grads.reached(home)
        start_s, tape = time.perf_counter(), self._host.tape
        delivered = deliver(grad, param)
        if tape is not None and delivered is not grad:
            tape.copied("d2h", start_s, grad.nbytes)
        return delivered

    def _may_send(self, home: Home, grad: Tensor) -> bool:
        """Whether a gradient can leave beside what goes on, in the room that there is."""
        outgoing, param = self._device.outgoing, home.param
        # Only what the optimizer trains has the hook that waits.
        if outgoing is None or not home.family.trained:
            return False
        if not outgoing.may_send(param, grad, self._reads):
            return False
        self._device.settle_sent(self._host.tape)
        if self._device.engine.ledger.room_bytes < grad.nbytes:
            outgoing.wait_all()
            self._device.settle_sent(self._host.tape)
        return not outgoing.sent_bytes or self._host.ledger.room_bytes >= gradient_bytes(home)

    def _gradient(self, home: Home) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(grad: Tensor) -> None:
            if self._device.outgoing is not None:
                self._device.outgoing.wait(home.param)  # not under the lock: others go on
            with self._lock:
                self._enter_backward(computes=False)  # on CUDA this is the caller's thread
                self._grads.before(home, grad)

        def after(param: Tensor) -> None:
            with self._lock:
                self._grads.after(home)

        return before, after

    # -- passes -----------------------------------------------------------------------------

    def _end_pass(self) -> None:
        """User code runs from here: no copy of a weight is kept."""
        self._pass.frame = self._pass.entry = None
        self._pass.backward = False
        self._units.planned.poll()
        self._device.abandon_sent(self._host.tape)
        self._device.end_pass()


def deliver_here(param: nn.Parameter, grad: Tensor) -> Tensor:
    """A gradient of a weight that lived where it is made when it was read."""
    return grad.to(param.dtype)


def await_autograd(place: torch.device) -> None:
    """A backward pass was cut short: its thread for the device may be amid a node. Behind that, on
    the same thread, comes a pass of ours.
    """
    with torch.inference_mode(False), torch.enable_grad():
        torch.zeros((), device=place, requires_grad=True).clone().backward()


COMPILED = (
    "torch.compile cannot be used with weights in frames: they are at another address each time, "
    "which a compiled graph does not see. Call the model uncompiled, or compute where the weights "
    "are (no device=..., no compute_dtype=...)"
)


CAPTURED = (
    "a CUDA graph cannot capture a model whose weights are in frames: they are at another address "
    "each time, and copies wait on the host. Capture a model that is not wrapped"
)


def move_buffers(model: nn.Module, place: torch.device) -> None:
    """Put buffers on the device, shared ones once."""
    copies: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != place.type:
                module._buffers[name] = copies.setdefault(buffer, buffer.to(place))
