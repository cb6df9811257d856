"""What is known of a model's units, and the choice made from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from offload.below import Below
from offload.engine import Engine
from offload.prefetch.policy import Choice, Decision, Part, Room, Unit, Way, decide
from offload.prefetch.trace import Phase, Trace
from offload.rerun import Seen

KEEP = Choice(Way.KEEP)


@dataclass(slots=True)
class Profile:
    """One forward pass: its visits in order, and what else it held."""

    elements: int  # of the model's input
    base_bytes: int = 0  # other memory before the first unit
    head_bytes: int = 0  # and what was saved after the last
    seen: list[Seen] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.seen]


def measured(seen: Sequence[Seen]) -> list[Unit]:
    """Units as the policy wants them. Those that save as much are taken to be alike: medians.

    A unit that was kept was not run again; what the others took then holds for it.
    """
    alike: defaultdict[int | None, list[Seen]] = defaultdict(list)
    for s in seen:
        if s.rerun_s is not None:
            alike[s.saved_bytes].append(s)
    again = {
        size: (_rerun_s(group), _parts(group), 2 * median(s.handling_s for s in group))
        for size, group in alike.items()
    }
    return [
        Unit(s.forward_s, s.saved_bytes or 0, s.boundary_bytes, s.recomputable,
             *again.get(s.saved_bytes, (None, ())))
        for s in seen
    ]  # fmt: skip


def _rerun_s(group: Sequence[Seen]) -> float:
    return median(s.rerun_s for s in group if s.rerun_s is not None)


def _parts(group: Sequence[Seen]) -> tuple[Part, ...]:
    """Operations that all of them ran."""
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for seen in group:
        for p in seen.parts:
            found[p.name, p.size_bytes].append(p.seconds)
    return tuple(
        Part(name, median(seconds), size)
        for (name, size), seconds in found.items()
        if len(seconds) == len(group)
    )


class Chooser:
    """Learns from passes, decides once for each kind of pass that is larger or other than before.

    ``below`` None: there is nothing to swap to.
    """

    def __init__(self, engine: Engine, below: Below | None) -> None:
        self.profile = Profile(0)
        self.decision: Decision | None = None
        self._engine = engine
        self._below = below

    def learn(self, profile: Profile) -> None:
        """A forward pass is over. Its reruns may add to what is seen later."""
        same = profile.names == self.profile.names
        if same and self.decision is not None and profile.elements <= self.profile.elements:
            return
        self.profile = profile
        self.decision = None

    @property
    def keeps_all(self) -> bool:
        """Whether the last pass that was learnt from, and the decision since, keep everything."""
        choices = self.decision.choices if self.decision else tuple(self.profile.choices)
        return all(c.way is Way.KEEP for c in (*choices, *self.profile.choices))

    def choice(self, at: int, name: str) -> Choice | None:
        """What was decided for this visit; None when nothing was."""
        seen = self.profile.seen
        if self.decision is None or at >= len(seen) or seen[at].name != name:
            return None
        return self.decision.choices[at]

    def decide(self, trace: Trace, swapped_bytes: int) -> bool:
        """Decide if that is due; True when units are to do otherwise than in the trace."""
        if self._below is not None:
            self._below.look(trace, swapped_bytes)
        profile = self.profile
        if self.decision is not None or not profile.seen:
            return False
        if any(s.saved_bytes is None for s in profile.seen):
            return False  # nothing was run backward
        units = measured(profile.seen)
        link = self._below.link() if self._below is not None else None
        self.decision = decide(units, self._room(trace, units), link)
        return list(self.decision.choices) != profile.choices

    def _room(self, trace: Trace, units: Sequence[Unit]) -> Room:
        """What the recorded step leaves to units: the rest is chunks, gradients, the head."""
        engine, profile = self._engine, self.profile
        capacity_bytes = engine.ledger.capacity_bytes
        moments = [m for m in trace.moments if m.phase is not Phase.UPDATE]
        homed = engine.space.disk is not None
        needs_bytes = max(
            (sum(trace.chunk_bytes[n.chunk] for n in m.needs) for m in moments), default=0
        )
        base_bytes = profile.base_bytes + 2 * engine.outlook.largest_gradient_bytes + (
            self._below.working_bytes if self._below is not None else 0
        )  # fmt: skip
        working_bytes = base_bytes + (needs_bytes if homed else 0)
        forward = [m.other_bytes for m in moments if m.phase is Phase.FORWARD]
        held_bytes = sum(u.boundary_bytes for u in units) + sum(
            u.saved_bytes for u, c in zip(units, profile.choices, strict=True) if c.way is Way.KEEP
        )
        # What appeared for a while (logits in another type, a product before its activation).
        transient_bytes = max(forward, default=0) - held_bytes - profile.base_bytes
        chunks_bytes = sum(c.size_bytes for c in engine.space.chunks) if homed else 0
        return Room(
            capacity_bytes - working_bytes,
            max(profile.head_bytes, transient_bytes),
            max(capacity_bytes - base_bytes - chunks_bytes, 0),
            self._below.displace_s_per_byte if self._below is not None else 0.0,
        )
