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

from offload.prefetch.trace import Trace
from offload.prefetch.uses import Bools, Floats, Ints, Uses, deaths
from offload.tiers.spec import Machine

_PRICE_ROUNDS = 80
_RUN = 16  # units; shorter runs are taken one by one
_SAMPLE = 16_384  # gaps that prices are found with, of larger traces
_BLOCK = 256  # moments per entry of the coarse table of least free room
_GOLDEN = (5**0.5 - 1) / 2


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

    def every(self, nth: int) -> Gaps:
        """The gaps of every n-th epoch."""
        epochs = np.arange(0, len(self.epoch_first), nth)
        bounds = np.append(self.epoch_first, len(self.chunk))
        counts = (bounds[1:] - bounds[:-1])[epochs]
        first = np.cumsum(counts) - counts
        rows = np.repeat(bounds[epochs] - first, counts) + np.arange(counts.sum())
        return Gaps(
            self.chunk[rows], self.size_bytes[rows], self.after[rows], self.reach[rows],
            self.span[rows], self.reads[rows], self.read_s[rows], first, self.write_s[epochs],
        )  # fmt: skip

    def saved_s(self, kept: Bools) -> float:
        """Drive time saved by keeping these gaps."""
        whole = np.logical_and.reduceat(kept, self.epoch_first) if len(kept) else kept
        return float(self.read_s[kept].sum() + self.write_s[whole].sum())


def find_gaps(trace: Trace, machine: Machine, uses: Uses) -> Gaps:
    """The gaps of every chunk of the trace. Seconds are for one direction running alone.

    A chunk's rows begin with its first change, so that each epoch's rows stand together.
    """
    count, rows = len(trace.moments), np.arange(len(uses.chunk))
    begin = uses.bounds[uses.chunk]
    length = uses.bounds[uses.chunk + 1] - begin
    changed = np.flatnonzero(uses.changes)
    turns = np.append(changed, len(rows))[np.searchsorted(changed, begin)]  # at or after begin
    written = turns < begin + length  # some use of this chunk changes it
    turn = np.where(written, turns - begin, 0)
    here = begin + (turn + rows - begin) % length
    there = begin + (here - begin + 1) % length
    reach = (uses.moment[there] - uses.moment[here]) % count
    reach[reach == 0] = count
    dead = np.full(len(trace.chunk_bytes), -1, dtype=np.int64)
    for chunk, moment in deaths(trace, uses).items():
        dead[chunk] = moment
    left = np.where(dead[uses.chunk] < 0, count, (dead[uses.chunk] - uses.moment[here]) % count)
    size = np.array(trace.chunk_bytes, dtype=np.int64)[uses.chunk]
    reads = uses.reads[there]
    first = np.flatnonzero(uses.changes[here] | ~written)
    latency_s = machine.disk_latency_s
    read_s = np.where(reads, size / machine.read_bytes_per_s + latency_s, 0.0)
    write_s = np.where(written, size / machine.write_bytes_per_s + latency_s, 0.0)[first]
    span = np.minimum(reach - 1, left)
    return Gaps(
        uses.chunk, size, uses.moment[here], reach, span, reads, read_s, first, write_s
    )  # fmt: skip


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

    def fit(self, first: Ints, length: Ints, size_bytes: Ints) -> Bools:
        """``fits`` for each of many spans. ``length``: 1 to the number of moments."""
        if not len(first):
            return np.empty(0, dtype=bool)
        # least[k][t]: the least room in the 2**k moments from t on, round the end.
        level = np.log2(length).astype(np.int64)
        # least[k, t]: the least room in the 2**k moments from t on, round the end.
        least = np.tile(self.free, (int(level.max()) + 1, 2))
        for k in range(len(least) - 1):
            np.minimum(least[k, : -(1 << k)], least[k, 1 << k :], out=least[k + 1, : -(1 << k)])
        enough: Bools = least[level, first] >= size_bytes
        enough &= least[level, first + length - (1 << level)] >= size_bytes
        return enough

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


def spread(gaps: Gaps, room_bytes: Ints, kept: Bools) -> Bools:
    """A choice that saves as much as ``kept`` with its reads apart from each other, or ``kept``.

    Over its longest gap one chunk that never changes may be kept as well as another of its size.
    Where those that stay are neighbours so are those that are read, and the drive has nothing to
    do, then too much. So they are taken by the golden ratio: whenever the room is full, those taken
    so far lie about evenly among all.
    """
    longest = np.zeros(int(gaps.chunk.max(initial=0)) + 1, dtype=np.int64)
    np.maximum.at(longest, gaps.chunk, gaps.span)
    free = gaps.reads & (gaps.write_s == 0)[gaps.epoch_of()]
    free &= (gaps.span > 0) & (gaps.span == longest[gaps.chunk])
    free &= gaps.size_bytes == np.median(gaps.size_bytes)
    rows = np.flatnonzero(free)
    rows = rows[np.argsort(gaps.after[rows], kind="stable")]
    apart = _Packing(gaps, np.maximum(room_bytes, 0))
    apart._try_gaps(np.flatnonzero(kept & ~free))
    apart._try_gaps(rows[np.argsort(np.arange(len(rows)) * _GOLDEN % 1.0, kind="stable")])
    apart.fill()
    return apart.kept if gaps.saved_s(apart.kept) >= gaps.saved_s(kept) else kept


class _Packing:
    """A choice of gaps under construction.

    Units (single gaps, or the gaps of an epoch that are not kept yet) are taken in a given order,
    each that fits. Long runs that fit together are found and taken by whole columns; the outcome
    is the same as one by one.
    """

    def __init__(self, gaps: Gaps, room_bytes: Ints) -> None:
        self.gaps = gaps
        self.room = Room(room_bytes)
        self.kept: Bools = gaps.span == 0
        self.first = (gaps.after + 1) % len(room_bytes)
        self.bounds = np.append(gaps.epoch_first, len(gaps.chunk))

    def _hopeful(self, rows: Ints) -> Bools:
        """For each of these gaps, whether it is kept or would fit now."""
        hopeful: Bools = self.kept[rows]
        rows = rows[~hopeful]
        hopeful[~hopeful] = self.room.fit(
            self.first[rows], self.gaps.span[rows], self.gaps.size_bytes[rows]
        )
        return hopeful

    def _try_gaps(self, order: Ints) -> None:
        """Each of these gaps, where it fits."""
        order = order[~self.kept[order]]
        while len(order := order[self._hopeful(order)]):
            order = order[self._take(order, np.arange(len(order) + 1)) :]

    def _try_epochs(self, order: Ints) -> None:
        """All gaps of each of these epochs, where they fit, or none of them."""
        while len(order):
            counts = self.bounds[order + 1] - self.bounds[order]
            ends = np.cumsum(counts)
            rows = np.repeat(self.bounds[order + 1] - ends, counts) + np.arange(ends[-1])
            hopeful = np.logical_and.reduceat(self._hopeful(rows), ends - counts)
            rows, order = rows[np.repeat(hopeful, counts)], order[hopeful]
            new = ~self.kept[rows]
            ends = np.concatenate(([0], np.cumsum(counts[hopeful])))
            ends = np.concatenate(([0], np.cumsum(new)))[ends]
            order = order[self._take(rows[new], ends) :]

    def _take(self, rows: Ints, ends: Ints) -> int:
        """Take units (rows[ends[i]:ends[i + 1]]) in turn; how many of them were dealt with.

        Runs are tried at half their length until they fit. Where they are short, taking units
        one by one is quicker.
        """
        at, width = 0, len(ends) - 1
        while width > _RUN and at < len(ends) - 1:
            width = min(width, len(ends) - 1 - at)
            if self._take_all(rows[ends[at] : ends[at + width]]):
                at += width
            width //= 2
        stop = min(at + _RUN * _RUN, len(ends) - 1)
        for i in range(at, stop):
            self._take_one(rows[ends[i] : ends[i + 1]].tolist())
        return stop

    def _take_all(self, rows: Ints) -> bool:
        """Take these gaps if there is room for all of them together."""
        gaps, free = self.gaps, self.room.free
        load = taken(self.first[rows], gaps.span[rows], gaps.size_bytes[rows], len(free))
        fits = bool((load <= free).all())
        if fits:
            self.room = Room(free - load.astype(np.int64))
            self.kept[rows] = True
        return fits

    def _take_one(self, unit: list[int]) -> None:
        """Take the gaps of one unit if there is room for each: they are apart in time."""
        gaps, room = self.gaps, self.room
        spans = [(int(self.first[g]), int(gaps.span[g]), int(gaps.size_bytes[g])) for g in unit]
        if all(room.fits(*span) for span in spans):
            for span in spans:
                room.take(*span)
            self.kept[unit] = True

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
    later rounds, which breaks the ties among equal chunks differently. Of a large trace only
    every n-th epoch is looked at, and taken for n, in half the rounds.
    """
    times = -(-len(gaps.chunk) // _SAMPLE)
    few = gaps if times == 1 else gaps.every(times)
    moments = len(room_bytes)
    start, size, epoch = (
        (few.after + 1) % moments,
        (few.size_bytes * times).astype(np.float64),
        few.epoch_of(),
    )
    price = np.zeros(moments)  # seconds per byte
    best, best_s, relax = price, np.inf, 1.0
    mean, rounds = np.zeros(moments), 0
    last = _PRICE_ROUNDS if times == 1 else _PRICE_ROUNDS // 2
    for round_ in range(last):
        whole, net_s = _demand(few, _costs(few, price))
        wanted = whole[epoch] | (net_s > 0)
        value_s = times * float(net_s[wanted].sum() + few.write_s[whole].sum())
        value_s += float(price @ room_bytes)
        if value_s < best_s:
            best, best_s = price, value_s
        else:
            relax *= 0.93
        over = taken(start[wanted], few.span[wanted], size[wanted], moments) - room_bytes
        over[(price == 0) & (over < 0)] = 0
        if round_ >= last // 2:
            mean, rounds = mean + price, rounds + 1
        norm = float(over @ over)
        if norm == 0 or value_s <= reached_s:
            break
        price = np.maximum(price + relax * (value_s - reached_s) / norm * over, 0.0)
    return [_costs(gaps, p) for p in ([best, mean / rounds] if rounds else [best])]


def _costs(gaps: Gaps, price: Floats) -> Floats:
    """What each gap's room costs at these prices per byte and moment."""
    total = np.concatenate(([0.0], np.cumsum(np.tile(price, 2))))
    start = (gaps.after + 1) % len(price)
    cost: Floats = gaps.size_bytes * (total[start + gaps.span] - total[start])
    return cost
