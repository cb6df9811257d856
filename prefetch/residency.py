"""Which chunks stay in the fast tier between uses: Belady's rule, priced, on a cyclic trace.

Between two consecutive uses of a chunk lies a *gap*. Keeping the chunk over the gap takes room
in every moment of its *span* and saves the read at the gap's end. The gaps from one change of
the contents to the next form an *epoch*: where all of them are kept, the write is saved too
(an optimizer state: one gap; a weight: three, from one update to the next). Choosing gaps under
a room per moment is interval packing. Two rules propose an answer and the better one is taken:

* gaps accepted in the order in which they end. That is furthest-next-use eviction (Belady,
  "A study of replacement algorithms", 1966) seen from the other side, and it is the best there
  is when all chunks have one size and one cost;
* gaps accepted by what they save beyond the price of the room they take, where prices come from
  the Lagrangian dual (subgradient with Polyak's step). That sees what Belady cannot: that a
  weight pinned for the whole step saves three reads and a write for the same room.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offload.prefetch.trace import Access, Trace
from offload.tiers.spec import Machine

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_PRICE_ROUNDS = 80
_BATCH = 4096  # gaps tried before the hopeless ones are sorted out again
_BLOCK = 256  # moments per entry of the coarse table of least free room


@dataclass(frozen=True, slots=True)
class Gaps:
    """The gaps of a trace as columns, one row each, ordered by chunk and epoch.

    ``after[g]``: moment of the use before gap g. ``reach[g]``: moments from there to the next
    use, which is at ``(after + reach) % moments``. ``span[g]``: for how many moments after
    ``after`` the chunk must stay for the saving: ``reach - 1``, less where its contents die
    before. ``reads[g]``: the next use needs the contents. ``read_s``: drive time of that read.
    ``epoch_first[e]``: row of epoch e's first gap; ``write_s[e]``: drive time of its write.
    """

    chunk: Ints
    size_bytes: Ints
    after: Ints
    reach: Ints
    span: Ints
    reads: Bools
    read_s: Floats
    epoch_first: Ints
    write_s: Floats

    def epoch_of(self) -> Ints:
        """For each gap, the index of its epoch."""
        lengths = np.diff(np.append(self.epoch_first, len(self.chunk)))
        return np.repeat(np.arange(len(self.epoch_first)), lengths)

    def saved_s(self, kept: Bools) -> float:
        """Drive time saved by keeping these gaps."""
        whole = np.logical_and.reduceat(kept, self.epoch_first) if len(kept) else kept
        return float(self.read_s[kept].sum() + self.write_s[whole].sum())


def accesses(trace: Trace) -> list[list[tuple[int, Access]]]:
    """For each chunk its uses (moment, access) in order.

    A chunk named twice in one moment has one use there: the first access says whether contents
    are needed, and any access but READ leaves the chunk changed.
    """
    uses: list[list[tuple[int, Access]]] = [[] for _ in trace.chunk_bytes]
    for index, moment in enumerate(trace.moments):
        for need in moment.needs:
            mine = uses[need.chunk]
            if mine and mine[-1][0] == index:
                if mine[-1][1] is Access.READ and need.access is not Access.READ:
                    mine[-1] = (index, Access.WRITE)
            else:
                mine.append((index, need.access))
    return uses


def deaths(trace: Trace, uses: list[list[tuple[int, Access]]]) -> dict[int, int]:
    """``trace.dead_after`` without the entries whose chunk's next use is not FRESH.

    Those contradict themselves; the safe reading is that the contents still matter.
    """
    alive = {}
    for chunk, moment in trace.dead_after.items():
        later = [access for when, access in uses[chunk] if when > moment]
        if uses[chunk] and (later or [uses[chunk][0][1]])[0] is Access.FRESH:
            alive[chunk] = moment
    return alive


def find_gaps(trace: Trace, machine: Machine) -> Gaps:
    """The gaps of every chunk of the trace. Seconds are for one direction running alone."""
    uses = accesses(trace)
    dead = deaths(trace, uses)
    rows: list[tuple[int, int, int, int, int, bool]] = []
    epoch_first: list[int] = []
    epoch_bytes: list[int] = []
    for chunk, mine in enumerate(uses):
        if not mine:
            continue
        size = trace.chunk_bytes[chunk]
        turn = next((i for i, use in enumerate(mine) if use[1] is not Access.READ), None)
        for position in range(len(mine)):
            index = (position + (turn or 0)) % len(mine)
            if turn is None or mine[index][1] is not Access.READ:
                epoch_first.append(len(rows))
                epoch_bytes.append(0 if turn is None else size)
            rows.append(_gap(chunk, size, index, mine, dead.get(chunk), len(trace.moments)))
    columns = [np.array(c, dtype=np.int64) for c in zip(*rows, strict=True)] or [_NONE] * 6
    chunk_, size_, after, reach, span, reads = columns
    latency_s = machine.disk_latency_s
    read_s = np.where(reads, size_ / machine.read_bytes_per_s + latency_s, 0.0)
    written = np.array(epoch_bytes, dtype=np.float64)
    write_s = written / machine.write_bytes_per_s + latency_s * (written > 0)
    first = np.array(epoch_first, dtype=np.int64)
    return Gaps(chunk_, size_, after, reach, span, reads.astype(bool), read_s, first, write_s)


_NONE: Ints = np.empty(0, dtype=np.int64)


def _gap(
    chunk: int, size: int, index: int, mine: list[tuple[int, Access]], dead: int | None, count: int
) -> tuple[int, int, int, int, int, bool]:
    """One row of Gaps: from use ``index`` of a chunk to its next, in a lap of ``count`` moments."""
    here = mine[index][0]
    there, access = mine[(index + 1) % len(mine)]
    reach = (there - here) % count or count
    span = reach - 1
    if dead is not None and (dead - here) % count < reach:
        span = (dead - here) % count
    return chunk, size, here, reach, span, access is not Access.FRESH


class Room:
    """Free bytes per moment of a cyclic step, with a coarse table for quick long look-ups."""

    __slots__ = ("_least", "free")

    def __init__(self, free_bytes: Ints) -> None:
        self.free = free_bytes.copy()
        padded = np.full(-(-len(self.free) // _BLOCK) * _BLOCK, np.iinfo(np.int64).max)
        padded[: len(self.free)] = self.free
        self._least = padded.reshape(-1, _BLOCK).min(axis=1)

    def fits(self, first: int, length: int, size_bytes: int) -> bool:
        """Whether every one of ``length`` moments from ``first`` on has that much room."""
        return all(self._fits(lo, hi, size_bytes) for lo, hi in self._pieces(first, length))

    def take(self, first: int, length: int, size_bytes: int) -> None:
        """Take room in ``length`` moments from ``first`` on; negative gives it back."""
        for lo, hi in self._pieces(first, length):
            self.free[lo:hi] -= size_bytes
            a, b = lo // _BLOCK, (hi - 1) // _BLOCK
            if b - a > 1:
                self._least[a + 1 : b] -= size_bytes
            self._least[a] = self.free[a * _BLOCK : (a + 1) * _BLOCK].min()
            if b > a:
                self._least[b] = self.free[b * _BLOCK : (b + 1) * _BLOCK].min()

    def back_from(self, end: int, floor: int, size_bytes: int) -> int:
        """The earliest moment >= floor from which there is room up to (not including) end."""
        width = 32
        while end > floor:
            lo = max(floor, end - width)
            short = (self.free[lo:end] < size_bytes).nonzero()[0]
            if len(short):
                return lo + int(short[-1]) + 1
            end, width = lo, width * 4
        return floor

    def _pieces(self, first: int, length: int) -> tuple[tuple[int, int], ...]:
        moments = len(self.free)
        if length <= 0:
            return ()
        first %= moments
        if first + length <= moments:
            return ((first, first + length),)
        return ((first, moments), (0, first + length - moments))

    def _fits(self, lo: int, hi: int, size_bytes: int) -> bool:
        a, b = -(-lo // _BLOCK), hi // _BLOCK
        if b - a < 2:
            return bool(self.free[lo:hi].min() >= size_bytes)
        if self._least[a:b].min() < size_bytes:
            return False
        ends = self.free[lo : a * _BLOCK], self.free[b * _BLOCK : hi]
        return all(bool((end >= size_bytes).all()) for end in ends)


def taken(first: Ints, length: Ints, size_bytes: Ints | Floats, moments: int) -> Floats:
    """Bytes taken per moment by spans of ``length`` moments from ``first`` on, cyclically."""
    start, laps = first % moments, 2 * moments + 1  # a span ends within the second lap
    ends = np.bincount(start, size_bytes, laps) - np.bincount(start + length, size_bytes, laps)
    both: Floats = np.cumsum(ends)[:-1].reshape(2, moments).sum(axis=0)
    return both


def choose(gaps: Gaps, room_bytes: Ints) -> Bools:
    """Which gaps to keep so that at most ``room_bytes[t]`` is taken in each moment t.

    Room already given to what the moments themselves need is not part of ``room_bytes``.
    Gaps without a span are always kept: there is no moment at which the chunk could be away.
    """
    if not len(gaps.chunk):
        return np.empty(0, dtype=bool)
    room = np.maximum(room_bytes, 0)
    belady = _Packing(gaps, room)
    belady.fill()
    best, best_s = belady.kept, gaps.saved_s(belady.kept)
    if best.all():
        return best
    for price_s in _prices(gaps, room, best_s):
        priced = _Packing(gaps, room)
        priced.by_price(price_s)
        priced.fill()
        if gaps.saved_s(priced.kept) > best_s:
            best, best_s = priced.kept, gaps.saved_s(priced.kept)
    return best


class _Packing:
    """A choice of gaps under construction."""

    def __init__(self, gaps: Gaps, room_bytes: Ints) -> None:
        self.gaps = gaps
        self.room = Room(room_bytes)
        self.kept: Bools = gaps.span == 0
        self.first = (gaps.after + 1).tolist()
        self.span = gaps.span.tolist()
        self.size = gaps.size_bytes.tolist()
        self.bounds = [*gaps.epoch_first.tolist(), len(gaps.chunk)]

    def _keep(self, gap: int) -> bool:
        if self.kept[gap]:
            return True
        at = self.first[gap], self.span[gap], self.size[gap]
        if self.room.fits(*at):
            self.room.take(*at)
            self.kept[gap] = True
        return bool(self.kept[gap])

    def _keep_epoch(self, epoch: int) -> None:
        """All gaps of an epoch or none of them."""
        new = [g for g in range(*self.bounds[epoch : epoch + 2]) if not self.kept[g]]
        for i, g in enumerate(new):
            if not self._keep(g):
                for done in new[:i]:
                    self.room.take(self.first[done], self.span[done], -self.size[done])
                    self.kept[done] = False
                return

    def _hopeful(self) -> Bools:
        """Gaps over which there may be room: no moment of theirs is full for every chunk."""
        gaps, moments = self.gaps, len(self.room.free)
        full = np.tile(self.room.free < gaps.size_bytes.min(), 2)
        before = np.concatenate(([0], np.cumsum(full)))
        start = (gaps.after + 1) % moments
        hopeful: Bools = self.kept | (before[start + gaps.span] == before[start])
        return hopeful

    def _try_gaps(self, order: Ints) -> None:
        for i in range(0, len(order), _BATCH):
            batch = order[i : i + _BATCH]
            for g in batch[(self._hopeful() & ~self.kept)[batch]].tolist():
                self._keep(g)

    def _try_epochs(self, order: Ints) -> None:
        for i in range(0, len(order), _BATCH):
            batch = order[i : i + _BATCH]
            hopeful = np.logical_and.reduceat(self._hopeful(), self.gaps.epoch_first)
            for e in batch[hopeful[batch]].tolist():
                self._keep_epoch(e)

    def by_price(self, price_s: Floats) -> None:
        """First the epochs, then the single gaps, that save most beyond the price of their room."""
        gaps = self.gaps
        whole, net_s = _demand(gaps, price_s)
        epoch_bytes = gaps.size_bytes[gaps.epoch_first]
        epoch_net_s = np.add.reduceat(net_s, gaps.epoch_first) + gaps.write_s
        order = np.argsort(-epoch_net_s / epoch_bytes, kind="stable")
        self._try_epochs(order[whole[order]])
        order = np.argsort(-net_s / gaps.size_bytes, kind="stable")
        self._try_gaps(order[net_s[order] > 0])

    def fill(self) -> None:
        """Whatever still fits and saves anything, soonest next use first."""
        gaps = self.gaps
        order = np.lexsort((gaps.span, gaps.after + gaps.span))
        self._try_gaps(order[gaps.read_s[order] > 0])
        # What is left saves only together with the rest of its epoch: the write.
        whole = np.logical_and.reduceat(self.kept, gaps.epoch_first)
        self._try_epochs(np.flatnonzero(~whole & (gaps.write_s > 0)))


def _demand(gaps: Gaps, price_s: Floats) -> tuple[Bools, Floats]:
    """At these prices per gap: which epochs are wanted whole, and each gap's own net saving."""
    net_s = gaps.read_s - price_s
    loss_s = np.add.reduceat(np.maximum(-net_s, 0.0), gaps.epoch_first)
    return (gaps.write_s > 0) & (gaps.write_s > loss_s), net_s


def _prices(gaps: Gaps, room_bytes: Ints, reached_s: float) -> list[Floats]:
    """Prices of each gap's room, in seconds, from the Lagrangian dual of the packing.

    Each moment's bytes get a price; all gaps worth more than they cost are wanted; prices rise
    where more is wanted than there is room (Polyak's step towards ``reached_s``, the saving of
    a packing in hand). Returns the prices of the least dual value seen, and the mean of the
    later rounds, which breaks the ties among equal chunks differently.
    """
    moments = len(room_bytes)
    start = (gaps.after + 1) % moments
    stop = start + gaps.span
    size = gaps.size_bytes.astype(np.float64)
    epoch = gaps.epoch_of()
    price = np.zeros(moments)  # seconds per byte
    best, best_s, relax = np.zeros(len(size)), np.inf, 1.0
    mean, rounds = np.zeros(len(size)), 0
    for round_ in range(_PRICE_ROUNDS):
        total = np.concatenate(([0.0], np.cumsum(np.tile(price, 2))))
        cost_s = size * (total[stop] - total[start])
        whole, net_s = _demand(gaps, cost_s)
        wanted = whole[epoch] | (net_s > 0)
        value_s = float(net_s[wanted].sum() + gaps.write_s[whole].sum() + price @ room_bytes)
        if value_s < best_s:
            best, best_s = cost_s, value_s
        else:
            relax *= 0.93
        over = taken(start[wanted], gaps.span[wanted], size[wanted], moments) - room_bytes
        over[(price == 0) & (over < 0)] = 0
        if round_ >= _PRICE_ROUNDS // 2:
            mean, rounds = mean + cost_s, rounds + 1
        norm = float(over @ over)
        if norm == 0 or value_s <= reached_s:
            break
        price = np.maximum(price + relax * (value_s - reached_s) / norm * over, 0.0)
    return [best, mean / rounds] if rounds else [best]
