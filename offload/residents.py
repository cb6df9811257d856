"""Weights that live on the device: where it has room for them beside what a step takes.

A frame's copy does not outlive a pass, since users may write to the weight (see offload.device).
A weight that lives here is no copy: the parameter *is* the tensor on the device, its gradient and
optimizer state stand beside it, and the user's optimizer updates it there. Nothing of it crosses
the bus. Its home on the host stays reserved, so that it can go back when the room is wanted.

When a step was recorded, it is known what the step takes; at the begin of the next one, while
there are no gradients, weights move (PatrickStar's warm-up, for placement on the device).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.bind import Binding, tensor_at
from offload.converted import Converted, ordinary_tensors
from offload.device import DeviceSpace
from offload.engine import Engine
from offload.graphs import Graphs
from offload.homing import copy_into, copy_out
from offload.internals import storage_lives
from offload.ledger import Ledger
from offload.optim.mirror import OptimizerProfile
from offload.prefetch.resident import (
    UPDATE_BYTES,
    Offer,
    Rates,
    choose_residents,
    offer_of,
    update_s,
)
from offload.prefetch.trace import Trace
from offload.saved import Saved
from offload.steps import Kind


@dataclass(frozen=True, slots=True)
class Levels:
    """The two levels between which weights move."""

    space: DeviceSpace
    ledger: Ledger  # of the device
    host: Engine
    binding: Binding


@dataclass(frozen=True, slots=True)
class Trained:
    """What moves with a trained weight. ``adopt``: have state that came back put into its homes.

    ``offers``: whether trained weights may live on the device; where state is stored narrowed not.
    """

    optimizer: Optimizer
    profile: OptimizerProfile
    adopt: Callable[[], None]
    offers: bool

    def state_bytes(self, param: nn.Parameter) -> int:
        """Bytes of a parameter's state."""
        known = self.profile.params.get(param)
        return sum(t.size_bytes for t in known.state) if known is not None else 0

    def counts_there(self, param: nn.Parameter) -> bool:
        """Whether 0-dim state (the step) has to be where the parameter is."""
        groups = (g for g in self.optimizer.param_groups if any(p is param for p in g["params"]))
        return any(g.get("fused") or g.get("capturable") for g in groups)


class Residents:
    """Decides which chunks of the device level live there, and moves them.

    ``place``, ``dtype``: where, and what is computed in (None: as weights are). ``changed`` is
    called after weights moved. Lives as long as the run; `consider` at the begin of a step.
    """

    def __init__(
        self, levels: Levels, place: torch.device, dtype: torch.dtype | None,
        trained: Trained | None, changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.chunks: dict[int, int] = {}  # that live here, and what each takes, in bytes
        self._levels = levels
        self._place = place
        self._trained = trained
        self._changed = changed
        self._crowded_out = False  # a step needed the room of all: they would only come and go
        self._graphs = Graphs()
        self._last: nn.Parameter | None = None  # that was read: an operation may be at it
        self.owes = False  # room was wanted that graphs held
        self._computed = Converted(dtype)
        self.seen: Trace | None = None  # that the last decision was made from
        self._moved = False

    @property
    def bytes(self) -> int:
        """What they take of the device."""
        return sum(self.chunks.values())

    @property
    def coming_bytes(self) -> int:
        """Of these, what is not there yet: a step makes gradients and converted copies itself."""
        held_bytes, binding = self._levels.space.pool.memory.held_bytes, self._levels.binding
        made = self._computed
        return sum(
            held_bytes(p.nbytes) * (binding.homes[p].family.trained and p.grad is None)
            + held_bytes(made.size_bytes(p)) * (not made.is_made(p))
            for p in binding.residents
        )

    @property
    def complete(self) -> bool:
        """Whether every weight lives here."""
        return len(self.chunks) == len(self._levels.space.chunks) > 0

    def has(self, param: nn.Parameter) -> bool:
        """Whether a parameter lives here."""
        return param in self._levels.binding.residents

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor that autograd saves is a weight that lives here, or a view of one."""
        return tensor.untyped_storage().data_ptr() in self._computed.storages

    def begin_pass(self) -> None:
        """Weights may have been written to: they are converted anew."""
        self._computed.clear()

    def read(self, param: nn.Parameter, *, recorded: bool) -> None:
        """One of them is about to be used; ``recorded``: autograd wants its gradient."""
        self._last = param
        if recorded:
            self._graphs.read(param)

    def save(self, tensor: Tensor) -> Saved:
        """Autograd saves a tensor that `holds` is true of."""
        return self._graphs.save(tensor)

    def end_pass(self) -> None:
        """No operation of a pass is under way; graphs may be."""
        self._last = None
        self._graphs.rest()

    def end_step(self) -> None:
        """The update begins."""
        self._graphs.forget()

    def value(self, param: nn.Parameter) -> Tensor | None:
        """What to compute with, where that is not the parameter itself."""
        return self._computed.of(param) if self._computed.needs(param) else None

    # -- deciding ---------------------------------------------------------------------------

    @property
    def kind(self) -> Kind:
        """Of the steps that tell what room there is."""
        return Kind.TRAIN if self._trained is not None else Kind.INFER

    def consider(self, trace: Trace, host: Trace | None, up_bytes_per_s: float) -> None:
        """Bring here what a recorded step leaves room for; once. No step may be under way.

        ``host``: the same step as the host saw it, whose update tells what updating there costs.
        """
        if self.seen is trace or self.chunks or self._crowded_out:
            return
        self.seen = trace
        homes = self._levels.binding.homes.values()
        elements = sum(h.param.numel() for h in homes if h.family.trained)
        rates = Rates(up_bytes_per_s, update_s(host, elements))
        aside_bytes = UPDATE_BYTES if self._trained and self._place.type == "cuda" else 0
        offers = [self._offer(c.id, trace, rates) for c in self._levels.space.chunks]
        capacity_bytes = self._levels.ledger.capacity_bytes
        possible = [offer for offer in offers if offer is not None]
        chosen = choose_residents(trace, possible, capacity_bytes, aside_bytes=aside_bytes)
        costs = {offer.chunk: offer.cost_bytes for offer in possible}
        with ordinary_tensors():
            for chunk in chosen:
                self._bring(chunk, costs[chunk])
        if self.chunks:
            self._settle()

    def lacking_bytes(self, trace: Trace) -> int | None:
        """What the device lacks for every weight to live here; None: some never may.

        ``trace``: a step with those that do.
        """
        chunks = [c.id for c in self._levels.space.chunks if c.id not in self.chunks]
        if not all(self._may_come(c) for c in chunks):
            return None
        cost_bytes = sum(self._cost_bytes(p) for c in chunks for p in self._params(c))
        other_bytes = max((m.other_bytes for m in trace.moments), default=0)
        return cost_bytes + other_bytes - self._levels.ledger.capacity_bytes

    def _params(self, chunk: int) -> tuple[nn.Parameter, ...]:
        return self._levels.space.params_of(chunk)

    def _trains(self, chunk: int) -> list[nn.Parameter]:
        homes = self._levels.binding.homes
        return [p for p in self._params(chunk) if homes[p].family.trained]

    def _may_come(self, chunk: int) -> bool:
        return not self._trains(chunk) or (self._trained is not None and self._trained.offers)

    def _offer(self, chunk: int, trace: Trace, rates: Rates) -> Offer | None:
        params, trains = self._params(chunk), self._trains(chunk)
        if any(p.grad is not None for p in params) or not self._may_come(chunk):
            return None
        cost_bytes = sum(self._cost_bytes(p) for p in params)
        copied_bytes = sum(self._computed.size_bytes(p) or p.nbytes for p in params)
        trained = sum(p.numel() for p in trains)
        return offer_of(trace, chunk, cost_bytes, copied_bytes, trained, rates)

    def _cost_bytes(self, param: nn.Parameter) -> int:
        held_bytes = self._levels.space.pool.memory.held_bytes
        cost_bytes = held_bytes(param.nbytes)
        cost_bytes += held_bytes(self._computed.size_bytes(param))
        if self._trained is not None and self._levels.binding.homes[param].family.trained:
            cost_bytes += held_bytes(param.nbytes) + self._trained.state_bytes(param)
        return cost_bytes

    # -- moving -----------------------------------------------------------------------------

    def _bring(self, chunk: int, cost_bytes: int) -> None:
        """Have a chunk's weights live here, where that can be."""
        ledger = self._levels.ledger
        if ledger.room_bytes < cost_bytes:
            return  # somebody holds on to frames
        ledger.take_fixed(cost_bytes)
        moved: list[nn.Parameter] = []
        for param in self._levels.space.params_of(chunk):
            if not self._bring_one(param):
                self._return(moved)
                ledger.take_fixed(-cost_bytes)
                return
            moved.append(param)
        self.chunks[chunk] = cost_bytes

    def _bring_one(self, param: nn.Parameter) -> bool:
        home, host = self._levels.binding.homes[param], self._levels.host
        if param.data_ptr() != home.address:
            return False  # given other data by the user
        try:
            target = torch.empty_strided(
                param.shape, param.stride(), dtype=param.dtype, device=self._place
            )
        except torch.OutOfMemoryError:
            return False  # others took of the device
        copy_out(host, home.family.weights, home.index, param.detach(), target)
        lives = storage_lives(param.data)
        param.data = target
        if lives():  # a view or an array of the user's: it must go on to show the weight
            param.data = tensor_at(home.family.weights, home.index, param.data.to("meta"))
            return False
        self._levels.binding.residents.add(param)
        self._computed.storages.add(param.untyped_storage().data_ptr())
        self._bring_state(param)
        return True

    def give_up_one(self) -> bool:
        """Room is wanted: send one chunk home. False: none is left that may go.

        What graphs hold would give no room, and its gradient is to come here.
        """
        free = [c for c in self.chunks if not any(map(self._is_used, self._params(c)))]
        if free:
            self._send_home(free[-1:])
            self._crowded_out = not self.chunks
        self.owes = bool(self.chunks) and (self.owes or not free)
        return bool(free)

    def _is_used(self, param: nn.Parameter) -> bool:
        return param is self._last or self._graphs.hold(param, *self._computed.storages_of(param))

    def leave_room(self, other_bytes: int) -> bool:
        """Whether so much fits beside them, and two of the largest frames of what is not here."""
        chunks = (c for c in self._levels.space.chunks if c.id not in self.chunks)
        frames = sorted((c.size_bytes for c in chunks), reverse=True)[:2]
        return other_bytes + sum(frames) <= self._levels.ledger.capacity_bytes

    def give_up_all(self) -> None:
        """Everything goes home. After a recorded step it may come again."""
        if self.chunks:
            self._send_home(list(self.chunks))

    def _send_home(self, chunks: list[int]) -> None:
        params = [p for c in chunks for p in self._levels.space.params_of(c)]
        with ordinary_tensors():
            self._return(params)
        self._levels.ledger.take_fixed(-sum(self.chunks.pop(c) for c in chunks))
        self._settle()

    def _return(self, params: list[nn.Parameter]) -> None:
        host, binding = self._levels.host, self._levels.binding
        binding.residents.difference_update(params)
        binding.note_residents()  # before anything is put into homes that nobody needed
        for param in params:
            home, here = binding.homes[param], param.detach()
            self._computed.drop(param)
            target = tensor_at(home.family.weights, home.index, here.to("meta"))
            copy_into(host, home.family.weights, home.index, target, here)
            grad, param.grad = param.grad, None
            param.data = target
            if grad is not None:
                param.grad = grad.to(target.device)
            self._send_state(param)
        if self._trained is not None:
            self._trained.adopt()

    def _state(self, param: nn.Parameter) -> dict[str, Any]:
        trained = self._trained
        return trained.optimizer.state.get(param, {}) if trained is not None else {}

    def _bring_state(self, param: nn.Parameter) -> None:
        home, entries = self._levels.binding.homes[param], self._state(param)
        for name, value in entries.items():
            if not isinstance(value, Tensor):
                continue
            if value.dim() == 0:
                assert self._trained is not None
                entries[name] = (
                    value.to(self._place) if self._trained.counts_there(param) else value
                )
                continue
            target = torch.empty_like(value, device=self._place)
            region = home.family.states.get(name)
            if region is not None and region.layout is home.family.layout:
                copy_out(self._levels.host, region, home.index, value, target)
            else:
                target.copy_(value)
            entries[name] = target

    def _send_state(self, param: nn.Parameter) -> None:
        """What has a home is left where it is, as a tensor that `adopt` does not know: it copies it
        there itself, without one in between. The rest is small."""
        home, entries = self._levels.binding.homes[param], self._state(param)
        for name, value in entries.items():
            if isinstance(value, Tensor):
                entries[name] = value.detach() if name in home.family.states else value.cpu()

    def take_moved(self) -> bool:
        """Whether weights moved since the last call: steps touch other chunks from now on."""
        moved, self._moved = self._moved, False
        return moved

    def _settle(self) -> None:
        """Homes that nobody needs any more are given up; those who plan updates are told."""
        self._moved = True
        binding, host = self._levels.binding, self._levels.host
        binding.note_residents()
        if host.space.disk is not None:
            frames = (c.id for c in host.space.chunks if c.frame is not None)
            host.evict([c for c in frames if binding.is_dead(c)])
        self._changed()
