"""Put the hooks of a run in place: on the model, its parameters and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from offload.device_hooks import DeviceHooks
from offload.early import EarlyUpdate
from offload.hooks import Hooks
from offload.optim.clip import GradNorms
from offload.optim.mirror import OptimizerProfile
from offload.optim.narrow import Narrowing
from offload.optim.step import ChunkedStep, Clip
from offload.residents import Levels, Residents, Trained
from offload.run import Runtime
from offload.steps import Kind
from offload.update import NotedGradients, UpdateStore

OnGrad = Callable[[nn.Parameter], None]


@dataclass(frozen=True, slots=True)
class How:
    """How the update is made, as the user asked for it."""

    max_grad_norm: float | None = None
    step_in_backward: bool = False
    state_dtype: str | None = None


def attach(
    run: Runtime,
    learnt: OptimizerProfile | None,
    narrowing: Narrowing,
    how: How,
    say: Callable[[str], None],
) -> None:
    """Hook up a run. ``learnt``: what its optimizer does, None without one."""
    parts = run.parts
    if run.optimizer is None or learnt is None:
        _attach_model(run, None)
        _attach_residents(run, None, lambda: None)
        return
    store = UpdateStore(parts.engine, parts.binding, learnt, run.optimizer)
    clip, on_grad = None, None
    if how.max_grad_norm is not None:
        noted = NotedGradients(parts.engine, parts.binding)
        norms = GradNorms(noted.untouched)
        on_grad = noted.then(norms.note)
        clip = Clip(how.max_grad_norm, tuple(run.model.parameters()), norms)
        if how.step_in_backward:
            say("step_in_backward is off: with max_grad_norm the update waits for the norm")
    elif how.step_in_backward:
        parts.early = EarlyUpdate(parts.engine, parts.binding, store, say)
        on_grad = parts.early.arrived
    _attach_model(run, on_grad)
    optimizer, device = run.optimizer, parts.device

    def at_once() -> bool:
        if device is not None and device.residents is not None:
            return device.may_update_at_once(optimizer)
        known = narrowing.state_dtype is None and parts.steps.all_in_memory
        return known and store.enter_all()

    _attach_optimizer(
        run,
        optimizer,
        lambda: ChunkedStep(
            optimizer,
            learnt,
            store,
            clip=clip,
            narrowing=narrowing,
            leave=at_once,
        ),
    )
    assert parts.stepper is not None
    trained = Trained(
        optimizer, learnt, parts.stepper.adopt_state, offers=narrowing.state_dtype is None
    )
    _attach_residents(run, trained, store.replan)


def _attach_residents(run: Runtime, trained: Trained | None, replan: Callable[[], None]) -> None:
    """Let weights come to live on the device."""
    parts, device = run.parts, run.parts.device
    if device is None or not device.settles:
        return

    def changed() -> None:
        replan()
        if parts.early is not None:
            parts.early.renew()

    def give_up() -> bool:
        # Of a step that was begun early the groups must stay what they are.
        begun = parts.stepper is not None and parts.stepper.is_ahead
        return not begun and residents.give_up_one()

    levels = Levels(device.engine.frames, device.engine.ledger, parts.engine, parts.binding)
    residents = Residents(levels, device.place, device.dtype, trained, changed)
    device.residents = residents
    device.engine.give_up = give_up
    device.engine.stuck_bytes = lambda: residents.bytes if residents.owes else 0
    device.steps.all_fits = lambda _: residents.complete


def _attach_model(run: Runtime, on_grad: OnGrad | None) -> None:
    parts = run.parts
    keeps = parts.early.keeps if parts.early is not None else lambda _: False
    common = run.model, parts.engine, parts.binding, parts.steps
    if parts.device is None:
        parts.hooks = Hooks(*common, on_grad, keeps, parts.means)
    else:
        parts.hooks = DeviceHooks(*common, parts.device, on_grad, keeps, parts.means)


def _attach_optimizer(run: Runtime, optimizer: Optimizer, make: Callable[[], ChunkedStep]) -> None:
    parts = run.parts

    def begin(*_: object) -> None:
        if parts.device is not None:
            parts.device.end_step()
        parts.steps.begin(Kind.TRAIN)

    def end(*_: object) -> None:
        parts.steps.end()
        if parts.early is not None:
            parts.early.end_step(parts.steps)

    # The stepper's own hooks stand between ours.
    parts.handles.append(optimizer.register_step_pre_hook(begin))
    parts.stepper = make()
    if parts.early is not None:
        parts.early.stepper = parts.stepper
    parts.handles.append(optimizer.register_step_post_hook(end))
