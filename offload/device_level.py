"""The device level of a run that never ran: its frames, and what a step would hold there.

Frames are cut by the functions that `DeviceSpace` cuts them with, and events of a dry run become
the moments that a watched step would record there, so that the plan decides what lives on the
device from what the runtime decides it from (`prefetch.resident.choose_residents`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from offload.dryrun import Event, Step
from offload.outline import Outline
from offload.prefetch.resident import UPDATE_BYTES
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.synthesis import Pace
from offload.tiers.layout import allocated_bytes, choose_frame_bytes, neighbours


@dataclass(frozen=True, slots=True)
class Rules:
    """``held_bytes``: what memory for so many bytes takes; ``aside_bytes``: of an update there."""

    held_bytes: Callable[[int], int]
    aside_bytes: int


CUDA = Rules(allocated_bytes, UPDATE_BYTES)


@dataclass(frozen=True, slots=True)
class Copies:
    """One chunk of the level: parameters of a family (by index) whose copies share a frame.

    ``size_bytes``: of the frame; ``copied_bytes``: what crosses the bus; ``itemsize``: of what is
    computed with.
    """

    family: int
    members: tuple[int, ...]
    size_bytes: int
    copied_bytes: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class Level:
    """A step as the device would record it while no weight lives there.

    ``needed_bytes``: the least that works, buffers included: two times the weights of a module,
    since what is read ahead, or still viewed, stands beside what is computed with.
    ``passing_bytes``: of activations and a gradient on its way, at most.
    """

    chunks: tuple[Copies, ...]
    trace: Trace
    needed_bytes: int
    buffer_bytes: int
    activation_bytes: int
    passing_bytes: int


@dataclass(frozen=True, slots=True)
class Frames:
    """How a level is cut: ``itemsizes`` of what each family is computed with, and the budget."""

    itemsizes: Sequence[int]
    budget_bytes: int
    buffer_bytes: int
    rules: Rules = CUDA

    @property
    def capacity_bytes(self) -> int:
        """For frames, other memory and what lives there."""
        return self.budget_bytes - self.buffer_bytes

    def cut(self, where: Outline) -> tuple[Copies, ...]:
        """As `offload.device.add_families`."""
        found: list[Copies] = []
        frame_bytes = choose_frame_bytes(self.budget_bytes)
        for f, (family, itemsize) in enumerate(zip(where.families, self.itemsizes, strict=True)):
            layout = family.weights.layout
            for group in neighbours(family.names, layout, frame_bytes // itemsize):
                stop = layout.starts[group[-1]] + layout.numels[group[-1]]
                copied = (stop - layout.starts[group[0]]) * itemsize
                held = self.rules.held_bytes(copied)
                found.append(Copies(f, tuple(group), held, copied, itemsize))
        return tuple(found)


def level_of(step: Step, where: Outline, frames: Frames, pace: Pace) -> Level:
    """The level of a step that computes in the frames' types."""
    chunks = frames.cut(where)
    writer = _Writer(step, where, chunks, frames.capacity_bytes, pace)
    for event in step.events:
        writer.take(event)
    trace = Trace(tuple(writer.moments()), tuple(c.size_bytes for c in chunks), {})
    saved = max(event.other_bytes for event in step.events)
    needed = writer.needed_bytes + frames.buffer_bytes
    return Level(chunks, trace, needed, frames.buffer_bytes, saved, writer.passing_bytes)


@dataclass(slots=True)
class _Open:
    """A moment that goes on."""

    phase: Phase
    chunk: int
    other_bytes: int = 0
    work_s: float = 0.0

    def closed(self) -> Moment:
        return Moment(
            self.phase, (Need(self.chunk, Access.READ),), self.work_s, self.other_bytes
        )  # fmt: skip


class _Writer:
    """Turns events into moments, one chunk each: a module asks for its weights one by one."""

    def __init__(
        self, step: Step, where: Outline, chunks: Sequence[Copies], capacity_bytes: int, pace: Pace
    ) -> None:
        self.needed_bytes = self.passing_bytes = 0
        self._step, self._pace = step, pace
        self._chunks, self._capacity_bytes = chunks, capacity_bytes
        self._places: dict[str, tuple[int, int]] = {}  # chunk, bytes of a gradient
        for c, copies in enumerate(chunks):
            family = where.families[copies.family]
            for i in copies.members:
                grad_bytes = family.weights.layout.numels[i] * copies.itemsize
                self._places[family.names[i]] = c, grad_bytes
        self._done: list[_Open] = []
        self._again = True  # user code ran: the next need makes a moment, whatever the last was
        self._sent_bytes = 0  # of the gradient that left last: noticed when the next one leaves

    def moments(self) -> list[Moment]:
        """All of them."""
        return [moment.closed() for moment in self._done]

    def take(self, event: Event) -> None:
        """One event, and the work behind it."""
        self._again |= event.ends_forward
        phase = Phase.BACKWARD if event.backward else Phase.FORWARD
        names = (span[0] for span in event.needs)  # empty parameters have no place
        wanted = [self._places[name][0] for name in names if name in self._places]
        for chunk in wanted:
            self._need(phase, chunk, event.other_bytes)
        grad_bytes = self._leaves(event)
        passing_bytes = event.other_bytes + max(self._sent_bytes, grad_bytes)
        self.passing_bytes = max(self.passing_bytes, passing_bytes)
        self._see(passing_bytes)
        sizes = (self._chunks[c].size_bytes for c in set(wanted))
        least = 2 * sum(sizes) + event.other_bytes + grad_bytes
        self.needed_bytes = max(self.needed_bytes, least)
        if self._done:
            self._done[-1].work_s += self._pace.work_s(phase, event.work)

    def _leaves(self, event: Event) -> int:
        """Bytes of a gradient that leaves. One of a shared weight is waited for at once."""
        if event.gradient is None:
            return 0
        _, size_bytes = self._places.get(event.gradient, (0, 0))
        if event.gradient not in self._step.shared:
            self._sent_bytes = size_bytes
        return size_bytes

    def _need(self, phase: Phase, chunk: int, saved_bytes: int) -> None:
        if self._again or self._done[-1].chunk != chunk:
            self._done.append(_Open(phase, chunk))
            self._again = False
        other = saved_bytes + self._sent_bytes
        if phase.in_backward:  # `DeviceEngine.need` keeps room for results that nobody sees
            most = self._capacity_bytes - self._chunks[chunk].size_bytes
            other = max(min(other + 2 * self._step.largest_result_bytes, most), other)
        self._see(other)

    def _see(self, other_bytes: int) -> None:
        if self._done:
            self._done[-1].other_bytes = max(self._done[-1].other_bytes, other_bytes)
