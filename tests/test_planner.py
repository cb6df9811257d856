"""The planner against an independent replay of its plans, a brute force, and a formula."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload.prefetch.plan import Plan
from offload.prefetch.planner import DoesNotFit, plan, smallest_bytes
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from offload.prefetch.uses import find_uses
from offload.tiers.spec import MIB, Machine

ONE_DRIVE = Machine(1.9e9, 6.0e9, 1.35e9, 1.5e9, 1e10)  # times of both directions add
DUPLEX = Machine(7e9, 5e9, 5e9, 4e9, 1e10)
SLOW = Machine(10.0, 5.0, 6.0, 4.0, 1e10, disk_latency_s=0.01)
UNIT = 4096


@st.composite
def traces(draw: st.DrawFn, most_chunks: int = 6, most_moments: int = 9) -> Trace:
    """Small traces; dead_after is only given where it is true."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=most_chunks))
    count = draw(st.integers(1, most_moments))
    order = list(Phase)
    drawn = draw(st.lists(st.sampled_from(order), min_size=count, max_size=count))
    phases = sorted(drawn, key=order.index)
    moments = []
    for phase in phases:
        chunks = draw(st.sets(st.integers(0, len(sizes) - 1), max_size=3))
        needs = tuple(Need(c, draw(st.sampled_from(list(Access)))) for c in sorted(chunks))
        work = draw(st.sampled_from([0.0, 0.3, 2.0]))
        moments.append(Moment(phase, needs, work, UNIT * draw(st.integers(0, 4))))
    dead = {}
    for chunk in range(len(sizes)):
        true = [t for t in range(count) if _next_access(moments, chunk, t) is Access.FRESH]
        choice = draw(st.sampled_from([None, *true]))
        if choice is not None:
            dead[chunk] = choice
    return Trace(tuple(moments), tuple(UNIT * s for s in sizes), dead)


def _next_access(moments: list[Moment], chunk: int, after: int) -> Access | None:
    for step in range(1, len(moments) + 1):
        for need in moments[(after + step) % len(moments)].needs:
            if need.chunk == chunk:
                return need.access
    return None


def typical(layers: int, pieces: int, size_bytes: int, compute_s: float) -> Trace:
    """A training step: weights, gradients and two states of ``pieces`` chunks a layer."""
    kind = layers * pieces

    def of(which: int, layer: int) -> range:
        return range(which * kind + layer * pieces, which * kind + (layer + 1) * pieces)

    moments = []
    for i in range(layers):
        reads = tuple(Need(c, Access.READ) for c in of(0, i))
        moments.append(Moment(Phase.FORWARD, reads, compute_s, 0))
    for i in reversed(range(layers)):
        reads = tuple(Need(c, Access.READ) for c in of(0, i))
        fresh = tuple(Need(c, Access.FRESH) for c in of(1, i))
        moments.append(Moment(Phase.BACKWARD, reads + fresh, 2 * compute_s, 0))
    for c in range(kind):
        kinds = [(0, Access.WRITE), (1, Access.READ), (2, Access.WRITE), (3, Access.WRITE)]
        needs = tuple(Need(k * kind + c, access) for k, access in kinds)
        moments.append(Moment(Phase.UPDATE, needs, compute_s, 0))
    dead = dict.fromkeys(range(kind, 2 * kind), len(moments) - 1)
    return Trace(tuple(moments), (size_bytes,) * (4 * kind), dead)


class Replay:
    """Follows a plan by the rules of its docstring, one moment at a time."""

    def __init__(self, trace: Trace, made: Plan, capacity_bytes: int) -> None:
        self.trace, self.plan, self.capacity_bytes = trace, made, capacity_bytes
        self.present = set(made.resident_at_start)
        self.unused: set[int] = set()  # read ahead and not needed since
        self.dirty: set[int] = set()
        self.stale: set[int] = set()  # dropped unwritten: the disk holds something else
        self.last_used: dict[int, int] = {}
        self.reads = self.writes = 0

    def lap(self) -> None:
        self.reads = self.writes = 0
        for t, moment in enumerate(self.trace.moments):
            needed = {n.chunk for n in moment.needs}
            dropped = self._drops(t, needed)
            for chunk in self.plan.ops[t].loads:
                assert chunk not in self.present, f"chunk {chunk} loaded while there"
                assert chunk not in dropped, f"chunk {chunk} dropped and read in one moment"
                assert chunk not in self.stale, f"chunk {chunk} read back, never written"
                self.present.add(chunk)
                self.unused.add(chunk)
                self.reads += self.trace.chunk_bytes[chunk]
            for need in moment.needs:
                if need.access is Access.FRESH:
                    self.present.add(need.chunk)
                    self.stale.discard(need.chunk)
                assert need.chunk in self.present, f"moment {t} lacks chunk {need.chunk}"
                if need.access is not Access.READ:
                    self.dirty.add(need.chunk)
                self.last_used[need.chunk] = t
            self.unused -= needed
            assert self.bytes_of(self.present) <= self.room(t)
            self._dwelt(t, dropped)
            self.dirty -= {c for c, d in self.trace.dead_after.items() if d == t}
            self.stale |= {c for c, d in self.trace.dead_after.items() if d == t} & self.present

    def _drops(self, t: int, needed: set[int]) -> set[int]:
        for chunk in self.plan.ops[t].drops:
            assert chunk in self.present, f"chunk {chunk} dropped while away"
            assert chunk not in needed, f"chunk {chunk} dropped where it is needed"
            assert chunk not in self.unused, f"chunk {chunk} read in vain"
            self.present.discard(chunk)
            if chunk in self.dirty:
                self.writes += self.trace.chunk_bytes[chunk]
                self.dirty.discard(chunk)
        return set(self.plan.ops[t].drops)

    def _dwelt(self, t: int, dropped: set[int]) -> None:
        """What a backward pass used goes at once only where there was no room to stay."""
        before = (t - 1) % len(self.trace.moments)
        for chunk in dropped:
            if self.last_used.get(chunk) != before:
                continue
            if self.trace.moments[before].phase is Phase.BACKWARD:
                wanted = self.bytes_of(self.present - self.unused) + self.trace.chunk_bytes[chunk]
                assert wanted > self.room(t), f"chunk {chunk} could have stayed in moment {t}"

    def bytes_of(self, chunks: set[int]) -> int:
        return sum(self.trace.chunk_bytes[c] for c in chunks)

    def room(self, t: int) -> int:
        return self.capacity_bytes - self.trace.moments[t].other_bytes


def check(trace: Trace, made: Plan, capacity_bytes: int) -> None:
    """The plan is consistent, cyclic, within its room, and moves what it forecasts."""
    replay = Replay(trace, made, capacity_bytes)
    for _ in range(3):
        replay.lap()
        assert replay.present == made.resident_at_start
    assert made.forecast.read_bytes == replay.reads
    assert made.forecast.write_bytes == replay.writes
    assert made.forecast.peak_bytes <= capacity_bytes


def queue_is_in_order_of_need(trace: Trace, made: Plan) -> bool:
    """Reads are queued in the order in which they are needed, over the lap's end too."""
    count, due = len(trace.moments), []
    needed = [{n.chunk for n in m.needs} for m in trace.moments]
    for t in range(2 * count):
        for chunk in made.ops[t % count].loads:
            lap = range(t, t + count + 1)
            due.append(next(u for u in lap if chunk in needed[u % count]))
    return due == sorted(due)


def unfinished() -> Trace:
    """A step that ends before the last of its writes does: nothing in it waits for that."""
    needs: list[tuple[Need, ...]] = [
        (Need(0, Access.READ), Need(1, Access.FRESH)),
        (Need(0, Access.WRITE), Need(1, Access.READ)),
        (), (), (), (Need(2, Access.WRITE),), (),
    ]  # fmt: skip
    moments = (Moment(Phase.FORWARD, n, 0.0, 4096 * (i == 4)) for i, n in enumerate(needs))
    return Trace(tuple(moments), (4096, 16384, 8192), {})


@settings(max_examples=150, deadline=None)
@given(traces(), st.integers(0, 14), st.sampled_from([SLOW, ONE_DRIVE]))
@example(unfinished(), 2, SLOW)
def test_any_plan_holds_in_an_independent_replay(
    trace: Trace, extra: int, machine: Machine
) -> None:
    capacity = smallest_bytes(trace) + UNIT * extra
    made = plan(trace, machine, capacity)
    check(trace, made, capacity)
    assert queue_is_in_order_of_need(trace, made)


@settings(max_examples=50, deadline=None)
@given(traces())
def test_smallest_capacity_works_and_a_byte_less_is_refused(trace: Trace) -> None:
    least = smallest_bytes(trace)
    check(trace, plan(trace, SLOW, least), least)
    with pytest.raises(DoesNotFit) as refusal:
        plan(trace, SLOW, least - 1)
    moment = trace.moments[refusal.value.moment]
    needed = sum(trace.chunk_bytes[n.chunk] for n in moment.needs) + moment.other_bytes
    assert refusal.value.needed_bytes == needed == least
    assert refusal.value.smallest_bytes == least
    assert refusal.value.capacity_bytes == least - 1


@settings(max_examples=50, deadline=None)
@given(traces())
def test_nothing_moves_when_everything_fits(trace: Trace) -> None:
    most_other = max(m.other_bytes for m in trace.moments)
    made = plan(trace, SLOW, sum(trace.chunk_bytes) + most_other)
    assert made.forecast.read_bytes == made.forecast.write_bytes == 0
    assert made.forecast.stall_s == 0
    assert made.forecast.binding == "compute"


@pytest.mark.parametrize("extra", range(1, 6))
def test_equal_chunks_read_in_a_circle_are_kept_as_belady_would(extra: int) -> None:
    """n chunks in turn and room for r besides the one in use: r of the n-1 others stay."""
    needs = [(Need(c, Access.READ),) for c in range(8)]
    trace = Trace(tuple(Moment(Phase.FORWARD, n, 0.0, 0) for n in needs), (UNIT,) * 8, {})
    made = plan(trace, ONE_DRIVE, (1 + extra) * UNIT)
    check(trace, made, (1 + extra) * UNIT)
    assert made.forecast.read_bytes == (8 - extra) * UNIT


@pytest.mark.parametrize("groups", [2, 3, 4, 6])
@pytest.mark.parametrize(
    ("machine", "pieces", "most"),
    [(ONE_DRIVE, 1, 1.10), (ONE_DRIVE, 4, 1.10), (DUPLEX, 4, 1.10), (DUPLEX, 1, 1.15)],
)
def test_typical_step_is_near_its_bounds(
    groups: int, machine: Machine, pieces: int, most: float
) -> None:
    """Of coarse chunks a duplex drive holds some back to hide writes: time bought with bytes."""
    trace = typical(24, pieces, 64 * MIB // pieces, compute_s=1e-3)
    parameters = 24 * 64 * MIB
    capacity = groups * 4 * 64 * MIB
    made = plan(trace, machine, capacity)
    check(trace, made, capacity)
    moved = made.forecast.read_bytes + made.forecast.write_bytes
    assert moved <= most * (10 * parameters - 4 * capacity)
    assert made.forecast.step_s <= 1.2 * made.forecast.bound_s
    assert made.forecast.binding == "disk"


def test_a_dead_gradient_is_not_written_and_a_living_one_is() -> None:
    """A gradient that dies after its update costs no write; one that may be read later does."""
    size = 1000
    other = tuple(Need(c, Access.READ) for c in (1, 2))
    moments = (
        Moment(Phase.BACKWARD, (Need(0, Access.FRESH),), 0.0, 0),
        Moment(Phase.UPDATE, (Need(0, Access.READ),), 0.0, 0),
        Moment(Phase.UPDATE, other, 0.0, 0),
    )
    contradicted = {0: 0}  # read after its death: it must not be lost
    for dead, written in (({0: 1}, 0), ({}, size), (contradicted, size)):
        made = plan(Trace(moments, (size,) * 3, dead), SLOW, 2 * size)
        assert made.forecast.write_bytes == written


def test_reads_of_the_first_moments_are_queued_in_the_lap_before() -> None:
    """Where the end of a step has room, it reads ahead for the next one's beginning."""
    wide = tuple(Need(c, Access.READ) for c in range(3))
    moments = (
        Moment(Phase.FORWARD, (Need(3, Access.READ), Need(4, Access.READ)), 1.0, 0),
        Moment(Phase.BACKWARD, wide, 1.0, 0),
        Moment(Phase.BACKWARD, (), 1.0, 0),
        Moment(Phase.BACKWARD, (), 1.0, 0),
    )
    trace = Trace(moments, (UNIT,) * 5, {})
    made = plan(trace, ONE_DRIVE, 3 * UNIT)
    check(trace, made, 3 * UNIT)
    assert {3, 4} <= made.resident_at_start
    assert made.forecast.stall_s < 0.01  # only the wide moment's, a few pages


@pytest.mark.parametrize("turn", range(5))
def test_a_read_is_never_queued_before_one_that_is_needed_sooner(turn: int) -> None:
    """Chunk 1 has room a moment before chunk 0 has, and is needed a moment later."""
    needs: list[list[tuple[int, Access]]] = [
        [(1, Access.READ)],
        [(0, Access.READ), (3, Access.FRESH)],
        [(2, Access.FRESH)],
        [],
        [(0, Access.READ)],
    ]
    moments = [Moment(Phase.UPDATE, tuple(Need(*n) for n in ns), 0.0, 0) for ns in needs]
    moments = moments[turn:] + moments[:turn]
    dead = {2: (2 - turn) % 5, 3: (1 - turn) % 5}
    trace = Trace(tuple(moments), (4 * UNIT, UNIT, 4 * UNIT, UNIT), dead)
    made = plan(trace, SLOW, 5 * UNIT)
    check(trace, made, 5 * UNIT)
    assert made.forecast.read_bytes == 5 * UNIT
    assert queue_is_in_order_of_need(trace, made)


def _uses(trace: Trace) -> list[tuple[int, Access]]:
    """The uses as (moment, access)."""
    uses = find_uses(trace)
    kinds = {(True, False): Access.READ, (True, True): Access.WRITE, (False, True): Access.FRESH}
    access = (kinds[k] for k in zip(uses.reads.tolist(), uses.changes.tolist(), strict=True))
    return list(zip(uses.moment.tolist(), access, strict=True))


def test_a_chunk_named_twice_in_a_moment_has_one_use_there() -> None:
    twice = {
        (Access.READ, Access.READ): Access.READ,
        (Access.READ, Access.WRITE): Access.WRITE,
        (Access.READ, Access.FRESH): Access.WRITE,
        (Access.FRESH, Access.READ): Access.FRESH,
        (Access.WRITE, Access.READ): Access.WRITE,
    }
    for named, meant in twice.items():
        moments = (Moment(Phase.UPDATE, tuple(Need(0, a) for a in named), 0.0, 0),) * 2
        trace = Trace(moments, (UNIT,), {})
        assert _uses(trace) == [(0, meant), (1, meant)]
        assert smallest_bytes(trace) == UNIT
        assert plan(trace, SLOW, UNIT).forecast.peak_bytes == UNIT


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ValueError, match="without moments"):
        plan(Trace((), (), {}), SLOW, 1)
