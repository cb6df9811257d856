"""Activations as planned: which units keep what they save, run again, or swap it.

A *unit* is a repeated block: a child of a ModuleList (or Sequential) with siblings of its class.
Hooks before and after each unit's forward say which visit saves what; the rest is in saved.py.

[Note: the first step]
Nothing is known of it. Its first unit keeps what it saves, and tells how much that is; the others
do the same if as much for each of them takes a modest part of the budget, else they are run again
in the backward pass. When the step is over `policy.decide` chooses from what was measured; where it
chooses otherwise than the step ran, the next step is recorded anew, since its moments differ.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, is_grad_enabled, nn

from offload.below import Below, DiskBelow
from offload.chooser import KEEP, Chooser, Profile
from offload.engine import Engine
from offload.internals import tree_leaves
from offload.prefetch.policy import Choice, Way
from offload.prefetch.trace import Trace
from offload.rerun import Rerun, Seen
from offload.site import Site
from offload.swap import SwapArea
from offload.swap_disk import DiskRoute, SwapFile, SwapStore
from offload.tiers.spec import Machine
from offload.visit import Visit

MODEST_SHARE = 0.6  # of the budget, that a first step may keep without knowing what follows

RECOMPUTE = Choice(Way.RECOMPUTE)
SWAP = Choice(Way.SWAP, 1.0)


@dataclass(slots=True)
class Pass:
    """A forward pass that runs, and visits whose backward pass may come."""

    profile: Profile
    units: int = 0  # that the model has
    visits: list[weakref.ref[Visit]] = field(default_factory=list)
    inputs: set[int] = field(default_factory=set)  # storages that were counted
    last_bytes: int = 0  # other memory after the last unit
    current: Seen | None = None  # whose backward runs


@dataclass(frozen=True, slots=True)
class Means:
    """What a run may use for activations. ``machine`` and ``file`` None: there is no disk."""

    setting: str
    machine: Machine | None
    file: SwapFile | None


KEEP_ALL = Means("keep", None, None)


@dataclass(frozen=True, slots=True)
class Ways:
    """What a unit may do: as ``setting`` says; swap by way of ``area``, to what is ``below``."""

    setting: str
    area: SwapArea | None = None
    below: Below | None = None


def ways_at_home(engine: Engine, means: Means) -> Ways:
    """For activations in the host's memory, as homes are: to the disk."""
    if means.machine is None or means.file is None:
        return Ways(means.setting)
    store = SwapStore(engine, means.file)
    area = SwapArea(engine, DiskRoute(store, engine.space.lanes))
    return Ways(means.setting, area, DiskBelow(engine, means.machine, store))


class Planned:
    """Decides for each visit of a unit, and keeps the account of a pass.

    ``engine``: of the tier where activations are.
    """

    def __init__(self, engine: Engine, ways: Ways, site: Site) -> None:
        self._engine = engine
        self._setting = ways.setting
        self._site = site
        self._area = ways.area
        self._pass = Pass(Profile(0))
        self._chooser = Chooser(engine, ways.below)
        if self._area is not None:
            engine.tenants.join(self._area.relieve)

    # -- passes -----------------------------------------------------------------------------

    def begin_pass(self, elements: int, units: int) -> None:
        """A forward pass of the model starts, with so many elements of input."""
        self._site.saved.visit = None  # an interrupt may have left it
        self.poll()
        earlier = [ref for ref in self._pass.visits if ref() is not None]
        # A backward pass may go through several forward passes.
        self._pass = Pass(Profile(elements), units, earlier)

    def end_pass(self) -> None:
        """It is over: the backward pass may come."""
        now = self._pass
        if not now.profile.seen:
            return
        now.profile.head_bytes = max(self._engine.ledger.other_bytes - now.last_bytes, 0)
        self._chooser.learn(now.profile)
        self.poll()
        self._read_ahead(len(now.visits))

    def poll(self) -> None:
        """Take note of transfers that are over and of memory that is free again."""
        if self._area is not None:
            self._area.poll()

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is done to activations: the hooks may come off where all fits."""
        return self._chooser.keeps_all

    @property
    def keeps_parts(self) -> bool:
        """Whether results of single operations are kept from units that are run again."""
        decision = self._chooser.decision
        return decision is not None and any(c.parts for c in decision.choices)

    def wants_another_record(self, trace: Trace | None) -> bool:
        """Between steps: decide, if that is due; True when the next step will run otherwise."""
        if self._setting != "auto" or trace is None:
            return False
        return self._chooser.decide(trace, self._swapped_bytes)

    def close(self) -> None:
        """End transfers and the file."""
        self._site.saved.visit = None
        if self._area is not None:
            self._engine.tenants.leave(self._area.relieve)
            self._area.close()

    def stats(self) -> dict[str, Any]:
        """What was chosen and what it was predicted to cost."""
        decision, profile = self._chooser.decision, self._pass.profile
        return {
            "ways": [c.way.value for c in profile.choices],
            "kept_results": [len(c.parts) for c in profile.choices],
            "saved_bytes": [s.saved_bytes for s in profile.seen],
            "forward_s": [s.forward_s for s in profile.seen],
            "forecast_peak_bytes": decision.peak_bytes if decision else None,
            "forecast_added_s": decision.added_s if decision else None,
            "swapped_bytes": self._swapped_bytes,
            "disk_bytes": self._area.route.disk_bytes if self._area else 0,
        }

    # -- visits -----------------------------------------------------------------------------

    def before(self, name: str, unit: nn.Module, args: Any, kwargs: Any) -> None:
        """A unit's forward is about to run."""
        self._site.saved.visit = None
        if not is_grad_enabled():
            return
        self.poll()
        now, profile, arguments = self._pass, self._pass.profile, (args, kwargs)
        if not profile.seen:
            profile.base_bytes = self._engine.ledger.other_bytes
        seen = Seen(name, self._clock(), None, self._boundary_bytes(arguments))
        if self._setting == "auto" and self._chooser.decision is None:
            seen.clock = self._clock
        choice = self._choose(name, unit)
        rerun = None
        if choice.way is Way.RECOMPUTE:
            rerun = Rerun(unit, seen, arguments, self._site)
            rerun.results.wanted = frozenset(choice.parts)
        visit = Visit(seen, choice, self._site.activations, rerun, arguments, self._enter_backward)
        profile.seen.append(seen)
        profile.choices.append(choice)
        now.visits.append(weakref.ref(visit))
        self._site.saved.visit = visit

    def after(self, output: object) -> None:
        """It is over (or it raised)."""
        visit, self._site.saved.visit = self._site.saved.visit, None
        if not isinstance(visit, Visit):
            return
        visit.seen.forward_s = self._clock() - visit.seen.forward_s
        visit.leave_forward(output, self._area)
        self._pass.last_bytes = self._engine.ledger.other_bytes

    def _choose(self, name: str, unit: nn.Module) -> Choice:
        setting, at = self._setting, len(self._pass.profile.seen)
        if setting != "auto":
            choice = {"keep": KEEP, "recompute": RECOMPUTE, "swap": SWAP}[setting]
        else:
            decided = self._chooser.choice(at, name)
            choice = decided if decided is not None else self._guess()
            if (choice.way is Way.KEEP or choice.parts) and self._outgrown(at):
                choice = RECOMPUTE
        if choice.way is Way.RECOMPUTE and (self._unsafe or self._site.foreign(unit)):
            choice = SWAP
        return KEEP if choice.way is Way.SWAP and self._area is None else choice

    @property
    def _unsafe(self) -> bool:
        """Whether units were seen to change what they are given."""
        seen = (*self._pass.profile.seen, *self._chooser.profile.seen)
        return not all(s.recomputable for s in seen)

    def _guess(self) -> Choice:
        """Nothing is known of this visit."""
        seen = self._pass.profile.seen
        known = [s.saved_bytes for s in seen if s.saved_bytes is not None]
        if not known:
            return KEEP
        ledger, left = self._engine.ledger, max(self._pass.units - len(seen), 1)
        forecast_bytes = ledger.other_bytes + left * max(known)
        return KEEP if forecast_bytes <= MODEST_SHARE * ledger.capacity_bytes else RECOMPUTE

    def _outgrown(self, at: int) -> bool:
        """Whether a larger input than the planned one leaves no room for what is to be kept."""
        planned, ledger = self._chooser.profile, self._engine.ledger
        growth = self._pass.profile.elements / max(planned.elements, 1)
        if growth <= 1.0 or self._chooser.decision is None:
            return False
        coming_bytes = growth * sum(s.saved_bytes or 0 for s in planned.seen[at:])
        return ledger.other_bytes + coming_bytes > MODEST_SHARE * ledger.capacity_bytes

    def _boundary_bytes(self, arguments: object) -> int:
        """Inputs that no visit of this pass has counted."""
        found = 0
        for x in tree_leaves(arguments):
            if isinstance(x, Tensor) and self._site.saved.weight(x) is None:
                storage = x.untyped_storage()
                if storage.data_ptr() not in self._pass.inputs:
                    self._pass.inputs.add(storage.data_ptr())
                    found += storage.nbytes()
        return found

    # -- backward ---------------------------------------------------------------------------

    def _enter_backward(self, visit: Visit) -> None:
        now = self._pass
        if now.current is visit.seen:
            return
        now.current = visit.seen
        at = next((i for i, ref in enumerate(now.visits) if ref() is visit), 0)
        for ref in now.visits[at + 1 :]:
            later = ref()
            if later is not None:
                later.forget()
        self.poll()
        self._read_ahead(at)

    def _read_ahead(self, at: int) -> None:
        """Begin to read what the visits before this one wait for: one of them."""
        for ref in reversed(self._pass.visits[:at]):
            visit = ref()
            if visit is not None and visit.is_away:
                visit.read_ahead()
                return

    def _clock(self) -> float:
        """Seconds, of which waiting for transfers is none; work that goes on by itself is over.

        That matters where it is measured, and would cost where it is not.
        """
        if self._setting == "auto" and self._chooser.decision is None:
            self._engine.await_compute()
        return time.perf_counter() - sum(self._engine.counters.stall_s.values())

    @property
    def _swapped_bytes(self) -> int:
        return self._area.moved_bytes if self._area is not None else 0


def find_units(model: nn.Module) -> dict[str, nn.Module]:
    """Repeated blocks by name: the outermost, that consist of modules themselves."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        if any(name == unit or name.startswith(f"{unit}.") for unit in found):
            continue
        kinds = Counter(type(child) for child in module.children())
        for child_name, child in module.named_children():
            if kinds[type(child)] > 1 and any(True for _ in child.children()):
                found[f"{name}.{child_name}" if name else child_name] = child
    return found
