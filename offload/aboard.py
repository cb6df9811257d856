"""What lives on the device of a run that never ran, and what still crosses the bus.

The choice is the runtime's own (offload/residents.py), made from the same figures: the level as a
recorded step shows it, what a weight takes there, rates of copies and of the update.

[Note: seconds]
Each pass takes as long as the slowest of its products, its copies up and, the backward pass, its
gradients down, as if they overlapped wholly. What lives there is updated behind what the host
updates, at the rate of the device's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from offload.device_level import Copies, Level, Rules
from offload.machines import Site
from offload.outline import Members, Outline
from offload.prefetch.bounds import Framed, passes_of
from offload.prefetch.planner import DoesNotFit, plan
from offload.prefetch.resident import Offer, Rates, choose_residents, offer_of, update_s
from offload.prefetch.trace import Moment, Phase, Trace
from offload.prefetch.variants import Situation, without_chunks
from offload.tiers.spec import Machine

KINDS = ("weights", "gradients", "optimizer", "converted")
_WRITES = {"weights": 2, "gradients": 1, "optimizer": 2}  # how often an update goes through them


@dataclass(frozen=True, slots=True)
class Aboard:
    """``chunks`` of the level live there: ``names``; ``held``: bytes of them by kind of KINDS.

    ``framed``: the step of the rest, for its bound. ``down_bytes``: gradients of the rest.
    ``update_s``: on the device. ``frames_bytes``: of frames, reading ahead included.
    ``peak_bytes``: of the device; frames of the first step stay, idle, while nobody wants the room.
    """

    chunks: tuple[int, ...]
    names: frozenset[str]
    held: dict[str, int]
    framed: Framed
    down_bytes: int
    update_s: float
    frames_bytes: int
    peak_bytes: int

    @property
    def resident_bytes(self) -> int:
        """Of the device, for good."""
        return sum(self.held.values())

    @property
    def up_bytes(self) -> int:
        """What goes up in a step."""
        return int(sum(p.up_bytes for p in passes_of(self.framed)))

    def passes_s(self) -> dict[Phase, float]:
        """Seconds of the forward and of the backward pass."""
        found = {Phase.FORWARD: 0.0, Phase.BACKWARD: 0.0}
        for phase, _, up_s, work_s in passes_of(self.framed):
            found[Phase.BACKWARD if phase.in_backward else phase] += max(up_s, work_s)
        found[Phase.BACKWARD] = max(found[Phase.BACKWARD], self.framed.down_s)
        return found

    def paced(self, host: Trace) -> Trace:
        """The host's trace, whose passes last as long as the device's, its update behind it."""
        moments = list(host.moments)
        for phase, seconds in self.passes_s().items():
            moments = _stretched(moments, phase, seconds)
        return self.with_update(replace(host, moments=tuple(moments)))

    def with_update(self, host: Trace) -> Trace:
        """The host's trace with the device's update behind its own, as the loop queues them."""
        if not self.update_s:
            return host
        update = Moment(Phase.UPDATE, (), self.update_s, 0)
        return replace(host, moments=(*host.moments, update))


@dataclass(frozen=True, slots=True)
class Boarding:
    """The question: what of this level would live there. ``trained``: whether trained weights may.

    ``host``: the step as the host saw it when nothing lived there; None: it saw none.
    """

    level: Level
    where: Outline
    site: Site
    budget_bytes: int
    rules: Rules
    trained: bool
    host: Trace | None

    def choose(self) -> Aboard:
        """What the runtime would choose."""
        capacity = self.budget_bytes - self.level.buffer_bytes
        offers = list(self._offers())
        trains = any(f.trained for f in self.where.families)
        chosen = choose_residents(
            self.level.trace, offers, capacity,
            aside_bytes=self.rules.aside_bytes if trains else 0,
        )  # fmt: skip
        while True:
            held = self._held(chosen)
            situation = Situation(self.level.trace, self._link(), capacity - sum(held.values()))
            rest = without_chunks(situation, chosen)
            needed = {n.chunk for m in rest.trace.moments for n in m.needs}
            try:
                read = plan(rest.trace, rest.machine, rest.capacity_bytes) if needed else None
            except DoesNotFit:
                if chosen:  # as the runtime: less lives there, so that the rest has more room
                    chosen = chosen[:-1]
                    continue
                read = None
            read_bytes = read.forecast.read_bytes if read is not None else 0
            return self._aboard(chosen, held, rest.trace, read_bytes)

    def _aboard(
        self, chosen: tuple[int, ...], held: dict[str, int], rest: Trace, read_bytes: int
    ) -> Aboard:
        level, machine = self.level, self.site.machine
        names = {n for c in chosen for n in self._names(level.chunks[c])}
        copied = [c.copied_bytes for c in level.chunks]
        down = sum(
            self._elements(copies) * copies.itemsize for c, copies in enumerate(level.chunks)
            if c not in chosen and self._family(copies).trained
        )  # fmt: skip
        framed = Framed(rest, copied, machine.h2d_bytes_per_s, read_bytes,
                        down / max(machine.d2h_bytes_per_s, 1.0))  # fmt: skip
        moved = sum(self._updated_bytes(level.chunks[c]) for c in chosen)
        touched = {n.chunk for m in rest.moments for n in m.needs}
        living = level.buffer_bytes + sum(held.values())
        free = self.budget_bytes - living - max(m.other_bytes for m in rest.moments)
        frames = min(sum(rest.chunk_bytes[c] for c in touched), max(free, 0))
        most = living + sum(rest.chunk_bytes) + level.passing_bytes
        return Aboard(
            chosen, frozenset(names), held, framed, down,
            moved / self.site.processor.bytes_per_s, frames, min(most, self.budget_bytes),
        )  # fmt: skip

    # -- what lives there -------------------------------------------------------------------

    def _offers(self) -> Iterator[Offer]:
        trained = [f for f in self.where.families if f.trained]
        elements = sum(n for f in trained for n in f.weights.layout.numels)
        rates = Rates(max(self.site.machine.h2d_bytes_per_s, 1.0), update_s(self.host, elements))
        for c, copies in enumerate(self.level.chunks):
            trains = self._family(copies).trained
            if not trains or self.trained:
                cost = sum(self._held((c,)).values())
                numel = self._elements(copies)
                yield offer_of(self.level.trace, c, cost, numel * copies.itemsize,
                               numel if trains else 0, rates)  # fmt: skip

    def _held(self, chunks: tuple[int, ...]) -> dict[str, int]:
        """As `offload.residents` counts what weights take that live there, with what is theirs."""
        found = dict.fromkeys(KINDS, 0)
        held_bytes = self.rules.held_bytes
        for copies in (self.level.chunks[c] for c in chunks):
            family = self._family(copies)
            itemsize = family.weights.itemsize
            for numel in (family.weights.layout.numels[i] for i in copies.members):
                found["weights"] += held_bytes(numel * itemsize)
                if copies.itemsize != itemsize:
                    found["converted"] += held_bytes(numel * copies.itemsize)
                if family.trained:
                    found["gradients"] += held_bytes(numel * itemsize)
                    found["optimizer"] += sum(numel * s.itemsize for s in family.states)
        return found

    def _updated_bytes(self, copies: Copies) -> int:
        """What an update goes through."""
        family = self._family(copies)
        if not family.trained:
            return 0
        each = sum(
            _WRITES.get(kind.name, _WRITES["optimizer"]) * kind.itemsize for kind in family.kinds
        )
        return self._elements(copies) * each

    def _family(self, copies: Copies) -> Members:
        return self.where.families[copies.family]

    def _elements(self, copies: Copies) -> int:
        numels = self._family(copies).weights.layout.numels
        return sum(numels[i] for i in copies.members)

    def _names(self, copies: Copies) -> list[str]:
        return [self._family(copies).names[i] for i in copies.members]

    def _link(self) -> Machine:
        """The bus as the disk of the device, as `offload.place` plans by it."""
        rate = max(self.site.machine.h2d_bytes_per_s, 1.0)
        return Machine(rate, rate, rate, rate, rate, h2d_bytes_per_s=rate, disk_latency_s=2e-5)


def _stretched(moments: list[Moment], phase: Phase, seconds: float) -> list[Moment]:
    """The moments of a phase take so long together; one without needs, where there is none."""
    now_s = sum(m.compute_s for m in moments if m.phase is phase)
    if now_s:
        factor = seconds / now_s
        return [replace(m, compute_s=m.compute_s * factor) if m.phase is phase else m
                for m in moments]  # fmt: skip
    ahead = [i for i, m in enumerate(moments) if m.phase is Phase.FORWARD]
    at = ahead[-1] + 1 if ahead and phase is Phase.BACKWARD else 0
    return [*moments[:at], Moment(phase, (), seconds, 0), *moments[at:]]
