"""Where weights are computed with and in which type; building the device level for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from offload.bind import Binding
from offload.config import Given, Tuning
from offload.device import DeviceSpace, add_families, frame_dtype
from offload.device_engine import DeviceEngine
from offload.device_hooks import COMPILED
from offload.device_side import UNMEASURED_BYTES_PER_S, Device
from offload.engine import Engine
from offload.errors import BudgetError, OffloadError
from offload.heap import Heap
from offload.internals import compiled
from offload.ledger import Ledger
from offload.outgoing import Outgoing
from offload.prefetch.plan import Plan
from offload.prefetch.planner import DoesNotFit, plan
from offload.prefetch.trace import Trace
from offload.steps import Steps
from offload.tiers.arena import CudaMemory, DeviceArena, PageMemory
from offload.tiers.bus import Bus
from offload.tiers.copy import Copier, CudaCopier, PlainCopier
from offload.tiers.fake import AdversarialLane
from offload.tiers.home import Region
from offload.tiers.lane import Lane, ThreadLane
from offload.tiers.layout import choose_frame_bytes
from offload.tiers.spec import Machine, format_size
from offload.watch import AllocatorWatch

EMULATED = "emulated"
DEVICE_SHARE = 0.8  # of free device memory, when no budget is given
CPU_SHARE = 0.25  # of host_memory, for frames and activations of a compute type on the CPU
COMPUTE_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Place:
    """Compute on ``device``, in ``dtype`` where weights are floating (None: as they are).

    ``own_memory``: the device's memory is not the host's (a GPU, or one that is emulated).
    """

    device: torch.device
    dtype: torch.dtype | None
    own_memory: bool


def choose(
    model: nn.Module,
    device: str | torch.device | None,
    compute_dtype: torch.dtype | None,
    tuning: Tuning,
) -> Place | None:
    """Where frames are needed; None: weights are computed with where they lie.

    Raises OffloadError for a device that is not here, a type that is not offered, a compiled
    model.
    """
    if compute_dtype is not None and compute_dtype not in (*COMPUTE_DTYPES, torch.float32):
        raise OffloadError(f"compute_dtype={compute_dtype}: give bfloat16, float16 or float32")
    floating = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = compute_dtype if compute_dtype is not None and floating - {compute_dtype} else None
    if device == EMULATED or tuning.emulate_device:
        place = Place(torch.device("cpu"), dtype, own_memory=True)
    elif device is not None and torch.device(device).type != "cpu":
        place = Place(_accelerator(torch.device(device)), dtype, own_memory=True)
    elif dtype is not None:
        place = Place(torch.device("cpu"), dtype, own_memory=False)
    else:
        return None
    if hasattr(model, "_orig_mod") or compiled(model):
        raise OffloadError(COMPILED)
    warm_up(place)
    return place


def warm_up(place: Place) -> None:
    """Have a GPU's libraries take what they keep, before anybody measures what we take.

    Of the host that is hundreds of MB for the context; of the device cuBLAS' workspaces, from
    torch's allocator: one for each thread that multiplies, and autograd's is another than ours.
    """
    if place.device.type == "cuda":
        with suppress(RuntimeError):  # if it must fail, then in the user's own step
            _multiply(place.device, place.dtype)


def _multiply(device: torch.device, dtype: torch.dtype | None) -> None:
    """One product with a bias and one without, on this thread and in a backward pass."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(64, 64, device=device, dtype=dtype or torch.float32, requires_grad=True)
        torch.addmm(x[0], x, x @ x).sum().backward()


def with_place(given: Given, place: Place | None) -> Given:
    """The budgets, with the device's filled in; on the CPU it is a part of the host's."""
    if place is None:
        return given
    budget, chosen = given.budget, given.chosen
    device_bytes = budget.device_bytes
    if device_bytes is None:
        if place.device.type == "cuda":
            device_bytes = int(DEVICE_SHARE * _free_bytes(place.device))
            why = "80% of what is free"
        else:
            device_bytes, why = int(CPU_SHARE * budget.host_bytes), "25% of host_memory"
        chosen = (*chosen, f"device_memory={device_bytes} ({why})")
    host_bytes = budget.host_bytes - (0 if place.own_memory else device_bytes)
    if host_bytes <= 0:
        raise _too_small(
            "frames and activations", device_bytes, budget.host_bytes, "host", "host_memory"
        )
    budget = replace(budget, device_bytes=device_bytes, host_bytes=host_bytes)
    return replace(given, budget=budget, chosen=chosen, place=place)


def refuse_hopeless(model: nn.Module, given: Given) -> None:
    """Refuse, before anything is moved, a device budget in which one weight cannot be used."""
    place = given.place
    if place is None or given.budget.device_bytes is None:
        return
    sizes = (
        (p.numel() * frame_dtype(p.dtype, place.dtype).itemsize, n)
        for n, p in model.named_parameters()
    )
    largest_bytes, name = max(sizes, default=(0, "nothing"))
    least = largest_bytes + _buffer_bytes(model)
    if least > given.budget.device_bytes:
        raise _too_small(
            f"{name} ({format_size(largest_bytes)}) beside the buffers", least,
            given.budget.device_bytes, "device", "device_memory",
        )  # fmt: skip


def build_device(
    model: nn.Module, host: Engine, binding: Binding, given: Given, tuning: Tuning
) -> Device:
    """The device level over homes that are in place. Raises BudgetError."""
    place, budget_bytes = given.place, given.budget.device_bytes
    assert place is not None
    assert budget_bytes is not None
    copier: Copier = PlainCopier()
    memory: Any = PageMemory()
    if place.device.type == "cuda":
        memory, copier = CudaMemory(place.device), CudaCopier(place.device)
    host.ledger.fixed_bytes += copier.host_bytes
    if host.ledger.capacity_bytes < 0:
        raise _too_small(
            "staging for copies", host.ledger.fixed_bytes, host.ledger.budget_bytes,
            "host", "host_memory",
        )  # fmt: skip
    straight = [] if host.space.disk is not None else _straight(binding, place.dtype)
    pinned = bool(straight) and copier.pin(straight)
    arena = DeviceArena(memory, poison=tuning.poison)
    space = DeviceSpace(arena, _lane("h2d", tuning, 1 + pinned), copier, host)
    chunk_bytes = tuning.device_chunk_bytes or choose_frame_bytes(budget_bytes)
    add_families(space, binding, place.dtype, chunk_bytes)
    ledger = Ledger(budget_bytes, arena, _buffer_bytes(model))
    engine = DeviceEngine(space, ledger, lasting=tuning.trust_versions)
    planner = _planner(engine, tuning) if tuning.prefetch else None
    steps = Steps(engine, planner, may_fit=False, tapes=tuning.tapes)
    if place.device.type == "cuda":
        ledger.heap = Heap(lambda: 0, kept_bytes=1 << 62)  # malloc has no part in this memory
    # Where the device's memory is the host's, a cast on the spot is as good as a copy.
    bus = outgoing = None
    if place.own_memory:
        bus = Bus(copier, arena, space.lanes["read"], _lane("d2h", tuning))
        home_of = binding.homes.get if pinned else lambda _: None
        outgoing = Outgoing(copier, bus.down, engine.counters.waited, home_of)
    settles = place.own_memory and tuning.residents
    device = Device(
        place.device, place.dtype, engine, steps, tuning.trust_versions, settles, outgoing, bus=bus
    )
    if place.device.type == "cuda":
        steps.watch = AllocatorWatch(device.present_bytes, place.device)
    return device


def _free_bytes(device: torch.device) -> int:
    """What this process may still take of a GPU: it may have set itself a limit."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    limit = torch.cuda.get_per_process_memory_fraction(device) * total_bytes
    held_bytes = torch.cuda.memory_reserved(device)
    return min(free_bytes, int(limit) - held_bytes)


def _accelerator(device: torch.device) -> torch.device:
    if device.type != "cuda":
        raise OffloadError(f"device={device}: give cuda, cuda:N, cpu or {EMULATED!r}")
    if not torch.cuda.is_available():
        raise OffloadError(
            f"device={device}, but torch sees no CUDA device: install a CUDA build of torch and a "
            f"driver, or leave device=... out to compute on the CPU"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.device("cuda", index)


def _straight(binding: Binding, dtype: torch.dtype | None) -> list[Region]:
    """The homes that copies are made from and to as they are: not what is converted on the way.

    Optimizer state stays on the host.
    """
    own = {f: f.params[0].dtype for f in binding.families}
    families = [f for f in binding.families if frame_dtype(own[f], dtype) is own[f]]
    return [r for f in families for r in (f.weights, f.grads) if r is not None]


def _lane(name: str, tuning: Tuning, workers: int = 1) -> Lane:
    if tuning.adversary is not None:
        return AdversarialLane(tuning.adversary + 2 + (name == "d2h"))
    return ThreadLane(name, workers)


def _planner(engine: DeviceEngine, tuning: Tuning) -> Callable[[Trace], Plan]:
    def make(trace: Trace) -> Plan:
        rate = tuning.machine.h2d_bytes_per_s if tuning.machine is not None else 0.0
        meter = engine.frames.lanes["read"].meter
        if not rate and meter.busy_s:
            rate = meter.moved_bytes / meter.busy_s
        rate = rate or UNMEASURED_BYTES_PER_S
        link = Machine(rate, rate, rate, rate, rate, h2d_bytes_per_s=rate, disk_latency_s=2e-5)
        while True:
            try:
                return plan(trace, link, engine.ledger.capacity_bytes)
            except DoesNotFit as error:
                if engine.give_up():
                    continue  # less lives there: the rest has more room
                raise _too_small(
                    f"moment {error.moment} of the step",
                    error.smallest_bytes + engine.ledger.fixed_bytes,
                    engine.ledger.budget_bytes, "device", "device_memory",
                ) from error  # fmt: skip

    return make


def _buffer_bytes(model: nn.Module) -> int:
    return sum(b.numel() * b.element_size() for b in model.buffers())


def _too_small(what: str, least: int, given: int, tier: str, option: str) -> BudgetError:
    return BudgetError(
        f"{tier} tier: {what} needs {format_size(least)}, but {option} is {format_size(given)}; "
        f"give at least {format_size(least)}",
        tier=tier,
        needed_bytes=least,
        given_bytes=given,
        smallest_bytes=least,
    )
