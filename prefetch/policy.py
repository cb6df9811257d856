"""What to do with the activations of each unit of a model: keep, recompute or swap. Pure.

A *unit* is one run of a repeated block. In its backward pass the unit needs the tensors that its
forward pass saved; until then they may be kept, dropped (the unit's forward runs again) or written
to the tiers below and read back ahead. The choice is a small knapsack: least added seconds such
that the bytes kept fit at every moment. Its terms follow LoHan (swap what the forward pass hides,
admit in the order of recompute benefit), MEMO (part of one unit may be swapped) and SSDTrain
(dropping the last units, whose backward comes first, saves little: the limits say how little).
Of a unit that runs again, results of single operations may be kept (Korthikanti et al. 2022):
those that save most seconds for a byte first.

[Note: limits]
Kept bytes only pile up in the forward pass, so there is one limit per unit: when the backward of
unit i runs, units 0..i-1 still hold what they keep, and unit i holds everything it saved. The
head (logits, loss) is one more, after the last unit. Inputs of units are held in every case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

_PARTS = (0.25, 0.5, 0.75, 1.0)  # of a unit that may be swapped, the rest being kept
# Passes over memory that a transfer costs beside the disk's own: copy, checksum, pages made and
# freed, and both compute threads held up at their next barrier. On two cores swapping everything
# cost 1.0 s for each GB written and read back, with nothing hidden.
PASSES = 9
_CELLS = 48  # of the table, in each of its two directions
_KEPT_CELLS = 256  # where nothing is swapped, so that there is but one
_WORTH_SHARE = 0.02  # of a rerun's time: results that save less are not considered
_MOST_PARTS = 16


class Way(StrEnum):
    """What happens to a unit's saved tensors between its forward and its backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(frozen=True, slots=True)
class Part:
    """An operation of a unit: with its result kept, running the unit again takes that much less."""

    name: str
    seconds: float
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Unit:
    """One run of a unit as it was measured.

    ``saved_bytes``: what keeping it holds beyond its inputs, ``boundary_bytes``: those inputs.
    ``recomputable``: whether running its forward once more is unseen by the user's code.
    ``rerun_s``: what that takes (it stops early; None: as long as the first time), ``parts``:
    operations of it that could be left out. ``handling_s``: what leaving any out adds, since every
    operation of both runs then passes through our hands.
    """

    forward_s: float
    saved_bytes: int
    boundary_bytes: int
    recomputable: bool = True
    rerun_s: float | None = None
    parts: tuple[Part, ...] = ()
    handling_s: float = 0.0

    @property
    def again_s(self) -> float:
        """Seconds of running it again."""
        return self.forward_s if self.rerun_s is None else self.rerun_s

    def without(self, names: Sequence[str]) -> tuple[int, float]:
        """Bytes of these parts' results, and seconds of running the rest again."""
        kept = [p for p in self.parts if p.name in names]
        left_s = max(self.again_s - sum(p.seconds for p in kept), 0.0)
        handling_s = self.handling_s if kept else 0.0
        return sum(p.size_bytes for p in kept), left_s + handling_s


@dataclass(frozen=True, slots=True)
class Choice:
    """``swapped``: which part of the saved bytes is swapped; the rest of that unit is kept.

    ``parts``: of a unit that runs again, the operations whose results are kept.
    """

    way: Way
    swapped: float = 0.0
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Room:
    """What activations may take, and what it costs to take it.

    ``available_bytes`` is for everything of the units (inputs, what is kept, what is being
    worked with); ``head_bytes`` more are held after the last unit. While they peak at no more
    than ``free_bytes`` nothing else has to leave; each byte beyond costs ``displace_s_per_byte``.
    """

    available_bytes: int
    head_bytes: int = 0
    free_bytes: int = 1 << 62
    displace_s_per_byte: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """The tier below: rates, the share of its time that is free, and what a moved byte costs.

    ``copy_bytes_per_s``: the processor's part of a transfer, which nothing hides. ``room_bytes``
    of it may be taken; what is more goes on to the tier ``beyond``, by the same lanes one after the
    other, so that seconds add (None: there is no more room).
    """

    write_bytes_per_s: float
    read_bytes_per_s: float
    free_share: float = 1.0
    copy_bytes_per_s: float = float("inf")
    backward_share: float = 2.0  # seconds of backward for each of forward
    room_bytes: int = 1 << 62
    beyond: Link | None = None

    @property
    def capacity_bytes(self) -> int:
        """Most that can be swapped by it."""
        return self.room_bytes if self.beyond is None else self.beyond.capacity_bytes

    def seconds(self, moved_bytes: int) -> tuple[float, float]:
        """Of its lanes, for so many bytes out, and for the same bytes in."""
        out_s, in_s = moved_bytes / self.write_bytes_per_s, moved_bytes / self.read_bytes_per_s
        more_bytes = moved_bytes - self.room_bytes
        if self.beyond is None or more_bytes <= 0:
            return out_s, in_s
        more_out_s, more_in_s = self.beyond.seconds(more_bytes)
        return out_s + more_out_s, in_s + more_in_s


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with each unit, and what that is predicted to cost.

    ``fits`` is False when even the least that these units can hold is too much; the choices
    are then those that hold least.
    """

    choices: tuple[Choice, ...]
    peak_bytes: int
    added_s: float
    fits: bool


@dataclass(frozen=True, slots=True)
class _State:
    """A partial solution: units so far, bytes kept and swapped, seconds of recomputation."""

    kept_bytes: int
    swapped_bytes: int
    recompute_s: float
    slack_bytes: int  # the least room that any limit so far has left
    choice: Choice | None = None
    before: _State | None = None

    def choices(self) -> tuple[Choice, ...]:
        found: list[Choice] = []
        state: _State | None = self
        while state is not None and state.choice is not None:
            found.append(state.choice)
            state = state.before
        return tuple(reversed(found))


def decide(units: Sequence[Unit], room: Room, link: Link | None = None) -> Decision:
    """The choices with the least predicted added seconds that fit; those that hold least if none.

    ``link`` None: there is no tier to swap to. The table of partial solutions is coarse where
    units differ (it keeps one per cell), so the uniform answers are always tried beside it.
    """
    limits = _limits(units, room)
    candidates = [*_table(units, limits, None), *_uniform(units, limits, link)]
    if link is not None:
        in_flight = _in_flight_bytes(units)
        within = _table(units, [limit - in_flight for limit in limits], link)
        candidates += [_fixed(units, s.choices(), limits) for s in within]
    finals = [s for s in candidates if _fits(s, units) and _goes_down(s, link)]
    if finals:
        best = min(
            finals, key=lambda s: (_added_s(s, units, room, link), s.swapped_bytes, s.kept_bytes)
        )
        fits = True
    else:
        least = [s for s in _uniform(units, limits, link) if _goes_down(s, link)]
        best = max(least, key=lambda s: s.slack_bytes)
        fits = False
    return Decision(
        best.choices(), room.available_bytes - best.slack_bytes,
        _added_s(best, units, room, link), fits,
    )  # fmt: skip


def predict(
    units: Sequence[Unit], choices: Sequence[Choice], room: Room, link: Link | None = None
) -> Decision:
    """The same prediction for choices that somebody else has made."""
    state = _fixed(units, choices, _limits(units, room))
    return Decision(
        tuple(choices), room.available_bytes - state.slack_bytes,
        _added_s(state, units, room, link), _fits(state, units) and _goes_down(state, link),
    )  # fmt: skip


def _limits(units: Sequence[Unit], room: Room) -> list[int]:
    """Most that units 0..i-1 may keep while unit i works backward; last, that all may keep."""
    limits, boundary = [], 0
    for unit in units:
        boundary += unit.boundary_bytes
        limits.append(room.available_bytes - boundary - unit.saved_bytes)
    return [*limits, room.available_bytes - boundary - room.head_bytes]


def _options(unit: Unit, link: Link | None) -> Iterator[tuple[Choice, int, int, float]]:
    """Choices for a unit, each with the bytes kept, the bytes swapped and the seconds added."""
    yield Choice(Way.KEEP), unit.saved_bytes, 0, 0.0
    if unit.recomputable:
        yield Choice(Way.RECOMPUTE), 0, 0, unit.again_s
    if unit.recomputable and link is None:
        names = [p.name for p in _worthy(unit)]
        for count in range(1, len(names) + 1):
            kept, seconds = unit.without(names[:count])
            if kept >= unit.saved_bytes:
                break
            if seconds >= unit.again_s:
                continue  # so few save less than handling them takes
            yield Choice(Way.RECOMPUTE, parts=tuple(names[:count])), kept, 0, seconds
    if link is not None:
        for part in _PARTS:
            swapped = int(part * unit.saved_bytes)
            yield Choice(Way.SWAP, part), unit.saved_bytes - swapped, swapped, 0.0


def _worthy(unit: Unit) -> list[Part]:
    """Parts that are worth keeping, those with most seconds for a byte first."""
    least_s = _WORTH_SHARE * unit.again_s
    found = [p for p in unit.parts if p.seconds > least_s and p.size_bytes]
    return sorted(found, key=lambda p: p.size_bytes / p.seconds)[:_MOST_PARTS]


def _after(state: _State, option: tuple[Choice, int, int, float], limit_bytes: int) -> _State:
    """One unit more: its own limit looks at what the units before it keep."""
    choice, kept, swapped, seconds = option
    return _State(
        state.kept_bytes + kept,
        state.swapped_bytes + swapped,
        state.recompute_s + seconds,
        min(state.slack_bytes, limit_bytes - state.kept_bytes),
        choice,
        state,
    )


def _end(state: _State, limit_bytes: int) -> _State:
    slack = min(state.slack_bytes, limit_bytes - state.kept_bytes)
    return _State(
        state.kept_bytes, state.swapped_bytes, state.recompute_s, slack, state.choice, state.before
    )


def _table(units: Sequence[Unit], limits: Sequence[int], link: Link | None) -> list[_State]:
    """All partial solutions, one for each cell of kept and swapped bytes: the cheapest."""
    total = sum(u.saved_bytes for u in units) or 1
    states = [_State(0, 0, 0.0, 1 << 62)]
    fine = _CELLS if link is not None else _KEPT_CELLS
    for unit, limit in zip(units, limits, strict=False):
        options = list(_options(unit, link))
        cells: dict[tuple[int, int], _State] = {}
        for state in states:
            if state.kept_bytes > limit:
                continue
            for option in options:
                new = _after(state, option, limit)
                if new.kept_bytes > limits[-1] or not _goes_down(new, link):
                    continue
                key = (fine * new.kept_bytes // total, _CELLS * new.swapped_bytes // total)
                old = cells.get(key)
                if old is None or _rank(new) < _rank(old):
                    cells[key] = new
        states = list(cells.values())
    return [_end(s, limits[-1]) for s in states]


def _rank(state: _State) -> tuple[float, int]:
    return state.recompute_s, state.kept_bytes + state.swapped_bytes


def _uniform(units: Sequence[Unit], limits: Sequence[int], link: Link | None) -> list[_State]:
    """Everything kept, everything recomputed (where it may be), everything swapped."""
    keep = Choice(Way.KEEP)
    swap = Choice(Way.SWAP, 1.0) if link is not None else keep
    drop = Choice(Way.RECOMPUTE)
    ways = [
        [keep] * len(units),
        [drop if u.recomputable else swap for u in units],
        [swap] * len(units),
    ]
    return [_fixed(units, choices, limits) for choices in ways]


def _fixed(units: Sequence[Unit], choices: Sequence[Choice], limits: Sequence[int]) -> _State:
    state = _State(0, 0, 0.0, 1 << 62)
    for unit, choice, limit in zip(units, choices, limits, strict=False):
        swapped = int(choice.swapped * unit.saved_bytes) if choice.way is Way.SWAP else 0
        kept, seconds = unit.saved_bytes - swapped, 0.0
        if choice.way is Way.RECOMPUTE:
            kept, seconds = unit.without(choice.parts)
        state = _after(state, (choice, kept, swapped, seconds), limit)
    return _end(state, limits[-1])


def _fits(state: _State, units: Sequence[Unit]) -> bool:
    """Whether every limit holds; with swapping, with one unit more in flight."""
    return state.slack_bytes >= (_in_flight_bytes(units) if state.swapped_bytes else 0)


def _goes_down(state: _State, link: Link | None) -> bool:
    """Whether the tiers below have room for what is swapped."""
    return link is None or state.swapped_bytes <= link.capacity_bytes


def _in_flight_bytes(units: Sequence[Unit]) -> int:
    """What swapping holds beside what is kept: one unit being written, or read ahead."""
    return max((u.saved_bytes for u in units), default=0)


def _added_s(state: _State, units: Sequence[Unit], room: Room, link: Link | None) -> float:
    """Seconds that recomputing, moving what nothing hides, and displacing chunks add."""
    peak_bytes = room.available_bytes - state.slack_bytes
    over_bytes = max(peak_bytes - room.free_bytes, 0)
    added_s = state.recompute_s + over_bytes * room.displace_s_per_byte
    moved = state.swapped_bytes
    if link is None or not moved:
        return added_s
    forward_s = sum(u.forward_s for u in units)
    # Recomputing lengthens the backward pass, which then hides more reading; not counted.
    out_s, in_s = link.seconds(moved)
    out_s -= link.free_share * forward_s
    in_s -= link.free_share * link.backward_share * forward_s
    processor_s = 2 * PASSES * moved / link.copy_bytes_per_s
    return added_s + processor_s + max(out_s, 0.0) + max(in_s, 0.0)
