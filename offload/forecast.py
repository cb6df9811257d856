"""What a fine-tuning run would need and take: bytes by kind and tier, peaks, seconds, disk wear.

A dry run (offload/dryrun.py) over an outline (offload/blueprint.py) gives a trace, and the planner
that would plan the run is asked for it. Bytes of weights, gradients and optimizer state are exact;
activations are those that autograd saves; seconds come from a roofline with measured factors.

[Note: a device]
Where a GPU computes, activations and frames are there, and so are the weights that the runtime
would have live there, with their gradients and state (offload/aboard.py). They come when a first
step was recorded, so what host and disk must have room for is what they hold without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from offload.aboard import Aboard, Boarding
from offload.blueprint import FineTune, draft, outline_of
from offload.device_level import CUDA, Frames, Level, Rules, level_of
from offload.dryrun import Step, dry_run
from offload.heap import FREE_KEPT_BYTES, kept_bytes_for
from offload.machines import Site
from offload.outline import Outline
from offload.prefetch.bounds import Limit, framed_bound
from offload.prefetch.plan import Forecast, Plan
from offload.prefetch.planner import DoesNotFit, plan, stay
from offload.prefetch.trace import Phase, Trace
from offload.synthesis import Setting, synthesise, update_needed_bytes
from offload.tiers.spec import Budget, format_size

DAY_S = 86_400.0
_BYTES_OF = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Holding:
    """Bytes of one kind. ``size_bytes``: of its elements; ``padding_bytes``: alignment and pages.

    ``device``, ``host``: where they are when the backward pass is over, activations when they peak;
    ``disk``: their homes, which have room for all that may leave memory. Homes of what lives on the
    device hold nothing, but stay reserved: on the disk, or where there is none on the host.
    """

    size_bytes: int
    padding_bytes: int = 0
    device: int = 0
    host: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Tier:
    """``needed_bytes``: the least that works; ``peak_bytes``: what is held at most within it."""

    given_bytes: int
    needed_bytes: int
    peak_bytes: int

    @property
    def spare_bytes(self) -> int:
        """Below zero: what is lacking."""
        return self.given_bytes - self.needed_bytes


@dataclass(frozen=True, slots=True)
class Pace:
    """Of one steady step. ``lanes``: seconds that each would take by itself.

    ``up_bytes``, ``down_bytes``: over the bus to a device, and back.
    """

    step_s: float
    bound_s: float
    binding: str
    tokens_per_s: float
    lanes: dict[str, float]
    read_bytes: int
    write_bytes: int
    up_bytes: int = 0
    down_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """The forecast. ``pace`` is None where it does not fit.

    ``resident_bytes``: of the device, for weights that live there and what is theirs.
    """

    parameters: int
    trained: int
    kinds: dict[str, Holding]
    tiers: dict[str, Tier]
    pace: Pace | None
    chunk_bytes: int
    spills: bool
    notes: tuple[str, ...] = ()
    resident_bytes: int = 0

    @property
    def fits(self) -> bool:
        """In every tier."""
        return self.pace is not None

    @property
    def written_bytes_a_day(self) -> float:
        """To the disk, without a pause."""
        return self.pace.write_bytes * DAY_S / self.pace.step_s if self.pace else 0.0

    def drive_days(self, endurance_bytes: float | None) -> float | None:
        """Days until the drive has taken what it is guaranteed to take; None where unknown."""
        if not endurance_bytes or not self.written_bytes_a_day:
            return None
        return endurance_bytes / self.written_bytes_a_day


class Forecaster:
    """Answers for one model; dry runs are kept, since most questions share one.

    ``rules``: what a device takes for a tensor.
    """

    def __init__(self, config: Any, rules: Rules = CUDA) -> None:
        self._config = config
        self._rules = rules
        self._runs: dict[FineTune, tuple[Any, Step]] = {}

    def answer(self, job: FineTune, site: Site, budget: Budget, chunk_bytes: int = 0) -> Answer:
        """The forecast of a job on a machine, within budgets. Raises OffloadError."""
        model, step = self._run(replace(job, compute_dtype=None))
        where = outline_of(model, job, budget.host_bytes, chunk_bytes)
        level = None
        if budget.device_bytes is not None:
            level = self._level(job, model, where, budget.device_bytes, site)
        return _Question(job, site, budget, where, step, level).answer(self._rules)

    def share(self, job: FineTune, host_bytes: int) -> tuple[float, int]:
        """(what part of its state memory holds beside activations, bytes of a chunk)."""
        model, step = self._run(replace(job, compute_dtype=None))
        where = outline_of(model, job, host_bytes)
        left = host_bytes - where.fixed_bytes - step.saved_bytes
        return max(left, 0) / where.total_bytes, where.chunk_bytes

    def _run(self, job: FineTune) -> tuple[Any, Step]:
        key = replace(job, in_backward=False, state_dtype=None)
        if key not in self._runs:
            made = draft(self._config, key)
            self._runs[key] = made.model, dry_run(made)
        return self._runs[key]

    def _level(
        self, job: FineTune, model: Any, where: Outline, budget_bytes: int, site: Site
    ) -> Level:
        """The device's part, which computes in the frames' type."""
        frames = job.compute_dtype or job.dtype
        _, step = self._run(replace(job, dtype=frames, compute_dtype=None))
        floating = {n: p.is_floating_point() for n, p in model.named_parameters()}
        itemsizes = [_BYTES_OF[frames] if floating[f.names[0]] else f.weights.itemsize
                     for f in where.families]  # fmt: skip
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        cut = Frames(itemsizes, budget_bytes, buffers, self._rules)
        return level_of(step, where, cut, site.processor)


class _Question:
    """One job, one machine, one budget."""

    def __init__(
        self, job: FineTune, site: Site, budget: Budget, where: Outline, step: Step,
        level: Level | None,
    ) -> None:  # fmt: skip
        self.job, self.site, self.budget = job, site, budget
        self.where, self.step, self.level = where, step, level
        kept = kept_bytes_for(budget.host_bytes) - FREE_KEPT_BYTES
        self.fixed_bytes = where.fixed_bytes + kept
        self.notes: list[str] = []

    def answer(self, rules: Rules) -> Answer:
        """``first``: the step as it is before anything lives on the device; ``trace``: after."""
        where, (setting, first) = self.where, self._first()
        aboard, trace = None, first
        if self.level is not None:
            aboard = self._board(self.level, setting, first, rules)
            if aboard.chunks:
                trace = self._write(replace(setting, residents=aboard.names))
        other = max((m.other_bytes for m in trace.moments), default=0)
        whole = where.total_bytes + self.fixed_bytes + max(m.other_bytes for m in first.moments)
        spills = whole > self.budget.host_bytes
        needed, made, there = self._least_bytes(first), None, frozenset[int]()
        try:
            paced = trace if aboard is None else aboard.paced(trace)
            made = self._plan(paced)
            there = resident_behind_passes(paced, made)
        except DoesNotFit as error:
            needed = max(needed, error.smallest_bytes + self.fixed_bytes)
        forecast = made.forecast if made is not None else None
        tiers = self._tiers(needed, whole, forecast, aboard)
        fits = forecast is not None and all(t.spare_bytes >= 0 for t in tiers.values())
        pace = self._pace(trace, forecast, aboard) if fits and forecast is not None else None
        return Answer(
            sum(sum(f.weights.layout.numels) for f in where.families),
            sum(sum(f.weights.layout.numels) for f in where.families if f.trained),
            self._kinds(there, other, aboard, spills=spills), tiers, pace,
            where.chunk_bytes, spills, tuple(self.notes),
            aboard.resident_bytes if aboard is not None else 0,
        )  # fmt: skip

    # -- the step ---------------------------------------------------------------------------

    def _first(self) -> tuple[Setting, Trace]:
        """A step in which nothing lives on the device, and how it is written."""
        coding_s = self.site.coding_s_per_byte if self.job.state_dtype is not None else 0.0
        setting = Setting(self.job.in_backward, self.level is not None, coding_s)
        trace = self._write(setting)
        if setting.in_backward:
            other = max(m.other_bytes for m in trace.moments)
            fits = self.where.total_bytes + other + self.fixed_bytes <= self.budget.host_bytes
            setting = replace(setting, in_backward=False)
            plain = self._write(setting)
            room = self.budget.host_bytes - self.fixed_bytes
            lacking = update_needed_bytes(plain, self.where) - room
            if fits or lacking > 0:
                why = "all stays in memory" if fits else f"{format_size(lacking)} are lacking"
                self.notes.append(f"the update in the backward pass would be off: {why}")
                return setting, plain
            setting = replace(setting, in_backward=True)
        return setting, trace

    def _write(self, setting: Setting) -> Trace:
        return synthesise(self.step, self.where, self.site.processor, setting)

    def _board(self, level: Level, setting: Setting, first: Trace, rules: Rules) -> Aboard:
        """What would live on the device. Before an update in the backward pass the host's own
        step is not known to who decides; narrower state keeps trained weights at home."""
        assert self.budget.device_bytes is not None
        trained = self.job.state_dtype is None
        host = None if setting.in_backward else first
        return Boarding(
            level, self.where, self.site, self.budget.device_bytes, rules, trained, host
        ).choose()  # fmt: skip

    def _plan(self, trace: Trace) -> Plan:
        """Raises DoesNotFit."""
        if not any(m.needs for m in trace.moments):
            return stay(trace)  # all lives on the device
        capacity = max(self.budget.host_bytes - self.fixed_bytes, 0)
        return plan(trace, self.site.machine, capacity)

    def _pace(self, trace: Trace, forecast: Forecast, aboard: Aboard | None) -> Pace:
        machine, moments = self.site.machine, trace.moments
        passes = sum(m.compute_s for m in moments if not m.phase.updates)
        limit = Limit(forecast.bound_s, forecast.wire_bound_s, forecast.binding)
        lanes = {
            "disk read": forecast.read_bytes / machine.read_bytes_per_s,
            "disk write": forecast.write_bytes / machine.write_bytes_per_s,
            "compute": passes,
            "update": sum(m.compute_s for m in moments if m.phase.updates),
        }
        up = down = 0
        if aboard is not None:
            up, down = aboard.up_bytes, aboard.down_bytes
            lanes["compute"] = sum(self.site.processor.work_s(Phase.FORWARD, e.work)
                                   for e in self.step.events)  # fmt: skip
            lanes["update on the device"] = aboard.update_s
            lanes["host to device"] = up / max(machine.h2d_bytes_per_s, 1.0)
            lanes["device to host"] = down / max(machine.d2h_bytes_per_s, 1.0)
            limit = framed_bound(forecast.drive, aboard.with_update(trace), aboard.framed)
        elif limit.binding != "disk":
            rest = {n: s for n, s in lanes.items() if not n.startswith("disk")}
            limit = limit._replace(binding=max(rest, key=lambda n: rest[n]))
        step_s = forecast.step_s * self.site.processor.effort.beyond
        return Pace(
            step_s, limit.bound_s, limit.binding, self.job.tokens / step_s, lanes,
            forecast.read_bytes, forecast.write_bytes, up, down,
        )  # fmt: skip

    # -- bytes ------------------------------------------------------------------------------

    def _least_bytes(self, first: Trace) -> int:
        """What ``offload.wrap`` refuses before anything is moved, and a moment while it runs."""
        where, sizes = self.where, first.chunk_bytes
        largest = max(
            n * f.weights.itemsize for f in where.families for n in f.weights.layout.numels
        )
        least = max(largest + where.chunk_bytes, where.copies * where.chunk_bytes)
        needs = (sum(sizes[n.chunk] for n in m.needs) + m.other_bytes for m in first.moments)
        return max(least, self.fixed_bytes, max(needs) + self.fixed_bytes)

    def _tiers(
        self, needed: int, whole: int, forecast: Forecast | None, aboard: Aboard | None
    ) -> dict[str, Tier]:
        budget, where = self.budget, self.where
        spills = whole > budget.host_bytes
        peak = forecast.peak_bytes + self.fixed_bytes if forecast else needed
        if not spills or (aboard is not None and aboard.chunks):
            peak = min(whole, budget.host_bytes)  # of the first step, in which all is at home
        found = {"host": Tier(budget.host_bytes, needed, peak)}
        if self.level is not None and aboard is not None and budget.device_bytes is not None:
            least = self.level.needed_bytes
            device = Tier(budget.device_bytes, least, max(least, aboard.peak_bytes))
            found = {"device": device, **found}
        if spills:
            total = where.total_bytes
            found["disk"] = Tier(
                total if budget.disk_bytes is None else budget.disk_bytes, total, total
            )
        return found

    def _kinds(
        self, there: frozenset[int], other: int, aboard: Aboard | None, *, spills: bool
    ) -> dict[str, Holding]:
        found: dict[str, Holding] = {}
        lives = aboard.held if aboard is not None else {}
        for name, (size, placed) in self.where.by_kind().items():
            held = sum(self._resident(name, there)) if spills else placed
            found[name] = Holding(
                size, placed - size, lives.get(name, 0), held, placed if spills else 0
            )
        if self.level is not None and aboard is not None:
            saved, buffers = self.level.activation_bytes, self.level.buffer_bytes
            frames = aboard.frames_bytes + lives["converted"]
            found["frames"] = Holding(frames, device=frames)
            found["activations"] = Holding(saved, device=saved)
            found["gradients in flight"] = Holding(other, host=other)
        else:
            buffers = 0
            found["activations"] = Holding(other, host=other)
        found["buffers and reserve"] = Holding(
            self.fixed_bytes + buffers, device=buffers, host=self.fixed_bytes
        )
        found["keys and values"] = Holding(0)
        return found

    def _resident(self, name: str, there: frozenset[int]) -> list[int]:
        known = ("weights", "gradients")
        return [
            size
            for family in self.where.families
            for kind in family.kinds
            if (kind.name if kind.name in known else "optimizer") == name
            for chunk, size in enumerate(kind.chunk_bytes(), kind.first)
            if chunk in there
        ]


def resident_behind_passes(trace: Trace, made: Plan) -> frozenset[int]:
    """What the plan has in memory, or on its way there, when the backward pass is over."""
    there = set(made.resident_at_start)
    for moment, ops in zip(trace.moments, made.ops, strict=True):
        there.difference_update(ops.drops)
        if moment.phase is Phase.UPDATE:
            break
        there.update(ops.loads)
        there.update(need.chunk for need in moment.needs)
    return frozenset(there)
