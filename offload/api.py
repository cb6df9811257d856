"""``offload.wrap`` and its relatives: put a model into its tiers, hand back the same objects."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from offload import vectormath
from offload.activations import Means, find_units
from offload.attach import How, attach
from offload.bind import (
    Binding,
    Family,
    build_family,
    choose_chunks,
    family_keys,
    mirrors_of,
    refuse_odd_parameters,
)
from offload.config import Given, Size, Tuning, understand, with_activations
from offload.engine import Engine
from offload.errors import BudgetError, OffloadError, SpillError
from offload.groupwise import format_of
from offload.handle import Handle, taken_over
from offload.heap import FREE_KEPT_BYTES, kept_bytes_for
from offload.homing import adopt_parameter
from offload.ledger import Ledger
from offload.modelclass import auto_class
from offload.optim.learn import learn
from offload.optim.mirror import OptimizerProfile
from offload.optim.narrow import Narrowing
from offload.parts import Parts
from offload.place import build_device, choose, refuse_hopeless, with_place
from offload.prefetch.plan import Plan
from offload.prefetch.planner import DoesNotFit, plan, stay
from offload.prefetch.trace import Trace
from offload.quantised import quantise, scratch_bytes, sizes_after
from offload.room import refuse_without_room, too_small
from offload.run import Runtime
from offload.scratch import ScratchMode
from offload.spins import ShortSpins
from offload.steps import Planner, Steps
from offload.swap_disk import SwapFile
from offload.tiers.copy import LendingHomes
from offload.tiers.disk import DiskFull
from offload.tiers.fake import AdversarialLane
from offload.tiers.frames import FramePool
from offload.tiers.gds import DiskIORefused, spill_file
from offload.tiers.home import HomeSpace
from offload.tiers.lane import DISK_WORKERS, Lane, ThreadLane
from offload.tiers.layout import choose_chunk_bytes
from offload.tiers.probe import cached_probe
from offload.tiers.spec import Machine, format_size

vectormath.settle()  # at once: the user's own first steps are to have the same bits, too
M = TypeVar("M", bound=nn.Module)


def wrap(
    model: M,
    optimizer: Optimizer | None = None,
    *,
    device: str | torch.device | None = None,
    device_memory: Size | None = None,
    compute_dtype: torch.dtype | None = None,
    host_memory: Size | None = None,
    disk: str | os.PathLike[str] | None = None,
    disk_memory: Size | None = None,
    max_grad_norm: float | None = None,
    step_in_backward: bool = False,
    state_dtype: str | None = None,
    activations: str = "keep",
    weight_dtype: str | None = None,
    tuning: Tuning | None = None,
) -> tuple[M, Optimizer | None]:
    """Manage a model's weights, gradients and optimizer state in tiers; the same objects return.

    Sizes are ints of bytes or strings such as "8GiB". ``host_memory`` bounds weights, gradients,
    state, staging and saved activations together; without it 80% of what is free is taken, and
    said. ``disk`` is a folder for the spill file; without it there is no disk tier.
    With ``device="cuda"`` weights are computed with in frames on the GPU, within
    ``device_memory`` together with activations; parameters stay CPU tensors, inputs are moved.
    ``compute_dtype`` (bfloat16, float16): frames hold converted copies, the weights themselves,
    gradients and the update stay as they are; floating inputs are converted.
    ``max_grad_norm`` clips as ``clip_grad_norm_`` would, sparing a pass over the gradients.
    ``step_in_backward``: weights are updated while the backward pass runs, same bits with less
    to move; after ``backward()`` there are no gradients, ``optimizer.step()`` does what is left.
    Together with ``max_grad_norm`` the update waits for the norm, as without it. Not for
    ``GradScaler``; if ``backward()`` raises, weights may be between two steps.
    ``state_dtype="bf16"`` or ``"int8"`` stores optimizer state in a half or a quarter of float32's
    bytes: other numbers than without, the same for every budget. See ``offload.optim.codecs``.
    ``activations``: what becomes of the tensors that repeated blocks save for the backward pass:
    "keep" (the default: the budget must hold them all), "recompute" (a block's forward runs again),
    "swap" (to disk; from a device to the host's memory first), or "auto", which keeps them where
    they fit and otherwise chooses per block from the recorded step. Same bits in all four.
    ``weight_dtype="int4"`` or ``"int8"`` stores the weights of linear layers that the optimizer
    does not train in 4.5 or 8.5 bits each, for good: see ``offload.quantised``. Other numbers than
    without, the same for every budget and tier.

    Raises BudgetError (before anything is moved) when the budgets are too small,
    CoupledOptimizerError for optimizers that mix parameters, SpillError when the disk is full.
    """
    told = {"device": device, "device_memory": device_memory, "compute_dtype": compute_dtype,
            "host_memory": host_memory, "disk": disk, "disk_memory": disk_memory}  # fmt: skip
    given = taken_over(model, optimizer, [n for n, value in told.items() if value is not None])
    if given is None:
        given = understand(host_memory, disk, disk_memory, device_memory)
        given = with_place(given, choose(model, device, compute_dtype, tuning or Tuning()))
    given = with_activations(given, activations)
    _quantise_in_place(model, optimizer, given, weight_dtype)
    how = How(max_grad_norm, step_in_backward, state_dtype)
    _manage(model, optimizer, given, how, tuning or Tuning())
    return model, optimizer


def init(
    factory: Callable[[], M],
    *,
    device: str | torch.device | None = None,
    device_memory: Size | None = None,
    compute_dtype: torch.dtype | None = None,
    host_memory: Size | None = None,
    disk: str | os.PathLike[str] | None = None,
    disk_memory: Size | None = None,
    weight_dtype: str | None = None,
    tuning: Tuning | None = None,
) -> M:
    """Build a model that is never whole in memory: ``factory()`` with large tensors in a file.

    Weights have the bits that the factory alone would give under the same seed. The result is
    managed; ``offload.wrap(model, optimizer)`` then takes in an optimizer over its parameters
    with the budgets given here. Without ``disk`` the model is simply built and managed.
    ``weight_dtype`` as in `wrap`: weights are quantised from the file, one tensor at a time.
    """
    form = format_of(weight_dtype)
    given = understand(host_memory, disk, disk_memory, device_memory)
    mode = ScratchMode(given.disk, given.budget.disk_bytes) if given.disk else nullcontext()
    with mode:
        model = factory()
    if form is not None:

        def allocate(shape: tuple[int, int]) -> torch.Tensor:
            with mode:
                return torch.empty(shape, dtype=torch.uint8)

        quantise(model, form, None, allocate, _say)
    if isinstance(mode, ScratchMode):
        mode.close()
    given = with_place(given, choose(model, device, compute_dtype, tuning or Tuning()))
    _manage(model, None, given, How(), tuning or Tuning())
    return model


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    *,
    model_class: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_memory: Size | None = None,
    compute_dtype: torch.dtype | None = None,
    host_memory: Size | None = None,
    disk: str | os.PathLike[str] | None = None,
    disk_memory: Size | None = None,
    weight_dtype: str | None = None,
    tuning: Tuning | None = None,
) -> Any:
    """A Hugging Face language model (or a ``model_class``), managed, never whole in memory.

    ``dtype``: of the weights, None keeps the checkpoint's; ``compute_dtype``: of the copies that
    are computed with, as in `wrap`. Host memory at load stays within the budget plus the largest
    converted tensor. What concerns the update is told to `wrap`, together with the optimizer.
    Raises what ``transformers`` raises for a bad path.
    """
    import transformers  # heavy, and only needed here

    loader = model_class or auto_class(transformers.AutoConfig.from_pretrained(path_or_id))

    def load() -> Any:
        # Loading in threads would escape the scratch mode, which is the loading thread's own.
        with _environment("HF_DEACTIVATE_ASYNC_LOAD", "1"):
            return loader.from_pretrained(path_or_id, dtype=dtype or "auto")

    return init(
        load,
        device=device, device_memory=device_memory, compute_dtype=compute_dtype,
        host_memory=host_memory, disk=disk, disk_memory=disk_memory, weight_dtype=weight_dtype,
        tuning=tuning,
    )  # fmt: skip


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _quantise_in_place(
    model: nn.Module, optimizer: Optimizer | None, given: Given, weight_dtype: str | None
) -> None:
    """Quantise a plain model, after refusing budgets that it will not fit into even then."""
    form = format_of(weight_dtype)
    if form is None:
        return
    sizes = list(sizes_after(model, form, optimizer))
    total = sum(size for size, _ in sizes)
    if given.disk is None and total > given.budget.host_bytes:
        raise too_small(given, total, f"a model of {form.name} weights")
    room_bytes = given.budget.host_bytes // (1 if optimizer is not None else 2)
    refuse_without_room(sizes, given, choose_chunk_bytes(room_bytes, 2), 2)  # as `choose_chunks`
    quantise(model, form, optimizer, lambda s: torch.empty(s, dtype=torch.uint8), _say)


def _manage(
    model: nn.Module,
    optimizer: Optimizer | None,
    given: Given,
    how: How,
    tuning: Tuning,
) -> None:
    for line in given.chosen:
        _say(line)
    refuse_odd_parameters(model)
    learnt, narrowing = learn(optimizer, how.state_dtype)
    refuse_hopeless(model, given)
    parts = _build(model, learnt, narrowing, given, tuning)
    if given.place is not None:
        parts.device = build_device(model, parts.engine, parts.binding, given, tuning)
    run = Runtime(model, optimizer, parts, given)
    parts.means = _means(given, parts.engine, tuning)
    attach(run, learnt, narrowing, how, _say)
    model.__dict__["_offload"] = Handle(run)


def _build(
    model: nn.Module,
    learnt: OptimizerProfile | None,
    narrowing: Narrowing,
    given: Given,
    tuning: Tuning,
) -> Parts:
    """Homes for everything, with the weights moved in."""
    trained = {p for p in learnt.params if p.requires_grad} if learnt is not None else set()
    chunk_bytes, copies = choose_chunks(given.budget.host_bytes, learnt, narrowing)
    chunk_bytes = tuning.chunk_bytes or chunk_bytes
    sizes = ((p.numel() * p.element_size(), n) for n, p in model.named_parameters())
    refuse_without_room(sizes, given, chunk_bytes, copies)
    how = chunk_bytes, given.place.dtype if given.place is not None else None
    try:
        space = _space(given, tuning)
        families = [
            build_family(space, named, is_trained, mirrors_of(named, learnt, narrowing), *how)
            for (_, is_trained, _), named in family_keys(model, trained, find_units(model)).items()
        ]
    except DiskFull as error:
        raise SpillError(str(error.strerror)) from error
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    buffers += scratch_bytes(model)
    fixed = space.fixed_bytes + buffers + _plain_state_bytes(learnt, narrowing, families)
    if given.budget.host_bytes < fixed:
        raise too_small(given, fixed, "weights, gradients and optimizer state")
    kept_bytes = kept_bytes_for(given.budget.host_bytes) if given.disk else FREE_KEPT_BYTES
    ledger = Ledger(given.budget.host_bytes, space.pool, fixed, kept_bytes)
    binding = Binding(families)
    engine = Engine(space, ledger, binding.is_dead)
    machine = _machine(given, tuning)  # while the budget is empty: probing takes buffers
    for home in binding.homes.values():
        adopt_parameter(engine, home)
    engine.settle()
    may_fit = not tuning.keep_hooks and given.place is None
    planner = _planner(engine, machine) if machine is not None else None
    if tuning.prefetch and given.disk is None:
        planner = stay
    spins = ShortSpins()
    steps = Steps(engine, planner, may_fit=may_fit, tapes=tuning.tapes, spins=spins)
    return Parts(engine, binding, steps, spins, machine=machine)


def _space(given: Given, tuning: Tuning) -> HomeSpace:
    disk = None
    if given.disk is not None:
        try:
            disk = spill_file(tuning.disk_io, given.disk, given.budget.disk_bytes, _say)
        except DiskIORefused as error:
            raise OffloadError(str(error)) from error
    homes = LendingHomes if given.place is not None else HomeSpace
    return homes(disk, FramePool(poison=tuning.poison), *_lanes(tuning))


def _means(given: Given, engine: Engine, tuning: Tuning) -> Means:
    """What activations may use: a spill file of their own, in what weights leave of the disk."""
    if given.disk is None or given.activations == "keep":
        return Means(given.activations, None, None)
    assert engine.space.disk is not None
    limit = given.budget.disk_bytes
    left = None if limit is None else limit - engine.space.disk.used_bytes
    machine = tuning.machine or cached_probe(given.disk)
    return Means(given.activations, machine, SwapFile(given.disk, left, _say))


def _lanes(tuning: Tuning) -> tuple[Lane, Lane]:
    if tuning.adversary is not None:
        return AdversarialLane(tuning.adversary), AdversarialLane(tuning.adversary + 1)
    return ThreadLane("read", DISK_WORKERS), ThreadLane("write", DISK_WORKERS)


def _machine(given: Given, tuning: Tuning) -> Machine | None:
    if not tuning.prefetch or given.disk is None:
        return None
    machine = tuning.machine or cached_probe(given.disk)
    if given.place is not None and given.place.device.type != "cpu":
        return replace(machine, beside_share=1.0)  # passes take no cores from the disk
    return machine


def _planner(engine: Engine, machine: Machine) -> Planner:

    def make(trace: Trace) -> Plan:
        try:
            return plan(trace, machine, engine.ledger.capacity_bytes)
        except DoesNotFit as error:
            least = error.smallest_bytes + engine.ledger.fixed_bytes
            raise BudgetError(
                f"host tier: moment {error.moment} of the step needs "
                f"{format_size(error.needed_bytes)}; give host_memory of at least "
                f"{format_size(least)}",
                tier="host",
                needed_bytes=least,
                given_bytes=engine.ledger.budget_bytes,
                smallest_bytes=least,
            ) from error

    return make


def _plain_state_bytes(
    learnt: OptimizerProfile | None, narrowing: Narrowing, families: Iterable[Family]
) -> int:
    """Optimizer state that stays in memory as plain tensors (factored moments and the like)."""
    if learnt is None:
        return 0
    mirrored = {p: f.states for f in families for p in f.params}
    return sum(
        t.size_bytes
        for param, what in learnt.params.items()
        for t in what.state
        if t.name not in narrowing.of(param)
        if t.shape != tuple(param.shape)
        or t.name not in (regions := mirrored.get(param, {}))
        or regions[t.name].itemsize != t.dtype.itemsize
    )


def _say(line: str) -> None:
    print(f"offload: {line}", file=sys.stderr)
