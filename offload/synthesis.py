"""A trace of a step that never ran: events of a dry run over the chunks of an outline.

It follows the engine's own rules for moments (`Engine.need`, `GradientHomes`, `EarlyUpdate`), so
that the trace has the moments of a recorded one: tests compare the two, key by key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from offload.dryrun import Event, Span, Step
from offload.outline import Members, Outline
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace


class Pace(Protocol):
    """How long things take on a machine, in seconds."""

    def work_s(self, phase: Phase, work: Iterable[tuple[float, float]]) -> float:
        """Operations of (floating-point operations, bytes) each."""
        ...

    def update_s(self, phase: Phase, size_bytes: int) -> float:
        """The optimizer goes through so many bytes of weights, gradients and state."""
        ...

    def handling_s(self, phase: Phase, size_bytes: int) -> float:
        """The engine meets needs of so many bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """``in_backward``: chunks are updated as soon as their gradients are there. ``on_device``:
    activations are, so that only gradients on their way home are the host's.
    ``coding_s_per_byte``: for each stored byte of state, beyond what the pace says.
    ``residents``: parameters that live on the device: the host never sees them."""

    in_backward: bool = False
    on_device: bool = False
    coding_s_per_byte: float = 0.0
    residents: frozenset[str] = frozenset()


def synthesise(step: Step, where: Outline, pace: Pace, setting: Setting) -> Trace:
    """The trace of one steady step. Gradients die at its end, as after ``zero_grad``."""
    writer = _Writer(step, where, pace, setting)
    for event in step.events:
        writer.take(event)
    writer.update()
    moments = tuple(writer.moments)
    touched = {n.chunk for m in moments for n in m.needs}
    dead = [
        c for f in where.families if f.grads for c in _ids(f.grads.first, f.grads.layout.chunks)
    ]
    last = len(moments) - 1
    return Trace(moments, where.sizes(), {c: last for c in dead if c in touched})


def update_needed_bytes(trace: Trace, where: Outline) -> int:
    """What `EarlyUpdate` wants to have room for: an update at the worst moment of a backward."""
    other = max((m.other_bytes for m in trace.moments if m.phase.in_backward), default=0)
    sizes = trace.chunk_bytes
    groups = [[sizes[n.chunk] for n in _group(f, c)] for f in where.families if f.trained
              for c in range(f.weights.layout.chunks)]  # fmt: skip
    largest = max(groups, key=sum, default=[])
    return other + sum(largest) + max(largest, default=0)


@dataclass(slots=True)
class _Open:
    """A moment that goes on."""

    phase: Phase
    needs: tuple[Need, ...]
    other_bytes: int
    work_s: float = 0.0


@dataclass(slots=True)
class _Groups:
    """What an update in the backward pass still waits for, by (family, chunk)."""

    missing: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    of: defaultdict[str, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    left: dict[str, int] = field(default_factory=dict)


class _Writer:
    """Turns events into moments."""

    def __init__(self, step: Step, where: Outline, pace: Pace, setting: Setting) -> None:
        self.moments: list[Moment] = []
        self._where, self._pace, self._setting = where, pace, setting
        self._sizes = where.sizes()
        self._open: _Open | None = None
        self._last: tuple[Need, ...] = ()
        self._gradients = _Gradients(step, where, setting)

    def take(self, event: Event) -> None:
        """One event, and the work behind it."""
        if event.ends_forward:
            self._last = ()
        if event.gradient is not None and event.gradient not in self._setting.residents:
            self._arrive(event)
        elif event.needs and (self._setting.on_device or not event.lookup):
            self._use(event)
        phase = Phase.BACKWARD if event.backward or event.ends_forward else Phase.FORWARD
        self._see(event.other_bytes)
        self._works(self._pace.work_s(phase, event.work))

    def update(self) -> None:
        """What is left to be updated, chunk by chunk."""
        self._last = ()
        self._gradients.activation_bytes = 0
        for f, family in enumerate(self._where.families):
            for c in range(family.weights.layout.chunks if family.trained else 0):
                if self._gradients.waiting(f, c):
                    self._step(Phase.UPDATE, _group(family, c), self._gradients.share(f, c))
        self._close()

    # -- moments ----------------------------------------------------------------------------

    def _need(self, phase: Phase, needs: tuple[Need, ...]) -> None:
        """As `Engine.need`: what the last moment has met makes no new one."""
        covered = all(
            any(n.chunk == m.chunk and (n.access == m.access or n.access is Access.READ)
                for m in self._last)
            for n in needs
        )  # fmt: skip
        if not covered:
            self._close()
            self._open = _Open(phase, needs, self._gradients.held_bytes)
            self._last = needs

    def _close(self) -> None:
        now = self._open
        if now is None:
            return
        handled = sum(self._sizes[n.chunk] for n in now.needs)
        other = 0 if now.phase is Phase.UPDATE else now.other_bytes
        handling_s = self._pace.handling_s(now.phase, handled)
        self.moments.append(Moment(now.phase, now.needs, now.work_s, other, handling_s))
        self._open = None

    def _works(self, seconds: float) -> None:
        if self._open is not None:
            self._open.work_s += seconds

    def _see(self, activation_bytes: int) -> None:
        """Memory that is not chunks: what is saved, and gradients on their way."""
        if not self._setting.on_device:
            self._gradients.activation_bytes = activation_bytes
        if self._open is not None:
            self._open.other_bytes = max(self._open.other_bytes, self._gradients.held_bytes)

    # -- events -----------------------------------------------------------------------------

    def _use(self, event: Event) -> None:
        spans = [span for span in event.needs if span[0] not in self._setting.residents]
        if not spans:
            return
        chunks = sorted({c for span in spans for c in self._chunks(span)})
        phase = Phase.BACKWARD if event.backward else Phase.FORWARD
        self._need(phase, tuple(Need(c, Access.READ) for c in chunks))
        if event.backward:
            self._gradients.reach(chunks)

    def _chunks(self, span: Span) -> range:
        name, start, stop = span
        f, i = self._where.place[name]
        kind = self._where.families[f].weights
        begin, length = kind.layout.starts[i], kind.layout.chunk_elements
        first, last = (begin + start) // length, (begin + max(stop - 1, start)) // length
        return range(kind.first + first, kind.first + last + 1)

    def _arrive(self, event: Event) -> None:
        """A gradient goes home chunk by chunk, or into the update at once."""
        assert event.gradient is not None
        name, grads = event.gradient, self._gradients
        grads.take(name)
        self._see(event.other_bytes)
        for group, size_bytes in grads.home(name):
            self._need(Phase.BACKWARD, group)
            self._works(self._pace.work_s(Phase.BACKWARD, [(0.0, 2.0 * size_bytes)]))
        for f, c in grads.arrive(name):
            group = _group(self._where.families[f], c, gradients=False)
            self._step(Phase.EARLY, group, grads.share(f, c))
            grads.stepped(f, c)
        self._see(event.other_bytes)

    def _step(self, phase: Phase, needs: tuple[Need, ...], share: float) -> None:
        """``share``: of the chunk, that is updated here."""
        self._need(phase, needs)
        # What is changed is read and written; a gradient is read wherever it is.
        weights = self._sizes[needs[0].chunk]
        moved = sum(self._sizes[n.chunk] * (2 if n.access is Access.WRITE else 1) for n in needs)
        moved += weights if phase is Phase.EARLY else 0
        state = sum(self._sizes[n.chunk] for n in needs[1:] if n.access is Access.WRITE)
        update_s = self._pace.update_s(phase, moved) + self._setting.coding_s_per_byte * state
        self._works(update_s * share)


class _Gradients:
    """Gradients in flight, at home, and what waits for them."""

    def __init__(self, step: Step, where: Outline, setting: Setting) -> None:
        self.activation_bytes = 0
        self._where = where
        self._in_backward = setting.in_backward
        self._residents = setting.residents
        self._flying: dict[str, int] = {}
        self._at_home: defaultdict[int, set[str]] = defaultdict(set)
        self._arrived: set[str] = set()
        self._shared = {
            c: name for name in sorted(step.shared - setting.residents)
            if self._family(name).trained for c in self._weight_chunks(name)
        }  # fmt: skip
        self._groups = _Groups()
        for f, family in enumerate(where.families):
            for c in range(family.weights.layout.chunks if family.trained else 0):
                names = self._names(f, c)
                self._groups.missing[f, c] = set(names)
                for name in names:
                    self._groups.of[name].append((f, c))
                    self._groups.left[name] = self._groups.left.get(name, 0) + 1

    @property
    def held_bytes(self) -> int:
        """Memory that is not chunks."""
        return self.activation_bytes + sum(self._flying.values())

    def reach(self, chunks: Iterable[int]) -> None:
        """A use of these weights in the backward pass: a shared one's gradient stays from here."""
        for c in chunks:
            name = self._shared.get(c)
            if name is not None and name not in self._flying and name not in self._arrived:
                self.take(name)

    def take(self, name: str) -> None:
        """One gradient tensor of it exists more."""
        f, i = self._where.place[name]
        kind = self._where.families[f].weights
        size_bytes = kind.layout.numels[i] * kind.itemsize
        self._flying[name] = self._flying.get(name, 0) + size_bytes

    def home(self, name: str) -> list[tuple[tuple[Need, ...], int]]:
        """The moments in which it goes home, with the bytes copied in each."""
        if self._in_backward:
            return []
        f, i = self._where.place[name]
        grads = self._where.families[f].grads
        assert grads is not None
        chunks = [grads.first + c for c in grads.layout.chunks_of(i)]
        access = {c: Access.WRITE if self._at_home[c] else Access.FRESH for c in chunks}
        for c in chunks:
            self._at_home[c].add(name)
        size_bytes = grads.layout.numels[i] * grads.itemsize // len(chunks)
        return [((Need(c, access[c]),), size_bytes) for c in chunks]

    def arrive(self, name: str) -> list[tuple[int, int]]:
        """It is there: groups that can be updated in the backward pass now."""
        self._arrived.add(name)
        f, i = self._where.place[name]
        kind = self._where.families[f].weights
        if not self._in_backward:
            self._flying.pop(name, None)
            return []
        self._flying[name] = kind.layout.numels[i] * kind.itemsize
        for key in self._groups.of[name]:
            self._groups.missing[key].discard(name)
        return [key for key in self._groups.of[name] if not self._groups.missing[key]]

    def stepped(self, f: int, c: int) -> None:
        """Gradients of which this was the last group are used up."""
        for name in self._names(f, c):
            self._groups.left[name] -= 1
            if not self._groups.left[name]:
                self._flying.pop(name, None)

    def waiting(self, f: int, c: int) -> bool:
        """Whether a chunk has gradients that no update has used."""
        names = self._names(f, c)
        if self._in_backward:
            return bool(names & self._arrived) and bool(self._groups.missing[f, c])
        return bool(names & self._arrived)

    def share(self, f: int, c: int) -> float:
        """What of a chunk is updated on the host."""
        family, homed = self._where.families[f], self._names(f, c)
        pieces = [(p.stop - p.start, family.names[p.tensor] in homed)
                  for p in family.weights.layout.pieces(c)]  # fmt: skip
        return sum(n for n, here in pieces if here) / max(sum(n for n, _ in pieces), 1)

    def _names(self, f: int, c: int) -> set[str]:
        """Parameters in a chunk that the host updates."""
        family = self._where.families[f]
        names = {family.names[p.tensor] for p in family.weights.layout.pieces(c)}
        return names - self._residents

    def _family(self, name: str) -> Members:
        return self._where.families[self._where.place[name][0]]

    def _weight_chunks(self, name: str) -> range:
        f, i = self._where.place[name]
        kind = self._where.families[f].weights
        inside = kind.layout.chunks_of(i)
        return range(kind.first + inside.start, kind.first + inside.stop)


def _group(family: Members, chunk: int, *, gradients: bool = True) -> tuple[Need, ...]:
    """What the update of one chunk of weights needs."""
    needs = [Need(family.weights.first + chunk, Access.WRITE)]
    if gradients and family.grads is not None:
        needs.append(Need(family.grads.first + chunk, Access.READ))
    needs += [Need(state.first + chunk, Access.WRITE) for state in family.states]
    return tuple(needs)


def _ids(first: int, count: int) -> range:
    return range(first, first + count)
