"""What a fine-tuning run would need and take: bytes by kind and tier, peaks, seconds, disk wear.

A dry run (offload/dryrun.py) over an outline (offload/blueprint.py) gives a trace, and the planner
that would plan the run is asked for it. Bytes of weights, gradients and optimizer state are exact;
activations are those that autograd saves; seconds come from a roofline with measured factors.

[Note: a device]
Where a GPU computes, activations and frames are there, and host and disk hold what they would hold
without it. Of the passes the longest of three lanes counts (products, weights going up, gradients
coming down), as if they overlapped wholly; the disk is simulated beside that. Frames do not outlive
a pass, so weights go up twice in a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from offload.blueprint import FineTune, draft, outline_of
from offload.dryrun import Step, dry_run
from offload.heap import FREE_KEPT_BYTES, kept_bytes_for
from offload.machines import Site
from offload.outline import Outline
from offload.prefetch.plan import Forecast, Plan
from offload.prefetch.planner import DoesNotFit, plan
from offload.prefetch.trace import Phase, Trace
from offload.synthesis import Setting, synthesise, update_needed_bytes
from offload.tiers.spec import MIB, Budget, format_size

DAY_S = 86_400.0
_DEVICE_CHUNK_BYTES = 64 * MIB
_BYTES_OF = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class Holding:
    """Bytes of one kind. ``size_bytes``: of its elements; ``padding_bytes``: alignment and pages.

    ``device``, ``host``: where they are when the backward pass is over, activations when they peak;
    ``disk``: their homes, which hold a copy of all that may leave memory.
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
    """Of one steady step. ``lanes``: seconds that each would take by itself."""

    step_s: float
    bound_s: float
    binding: str
    tokens_per_s: float
    lanes: dict[str, float]
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The forecast. ``pace`` is None where it does not fit."""

    parameters: int
    trained: int
    kinds: dict[str, Holding]
    tiers: dict[str, Tier]
    pace: Pace | None
    chunk_bytes: int
    spills: bool
    notes: tuple[str, ...] = ()

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


@dataclass(frozen=True, slots=True)
class Need:
    """What the device would have to hold at once, and what goes up and down in a step."""

    peak_bytes: int
    activation_bytes: int
    up_bytes: int
    down_bytes: int
    buffer_bytes: int


class Forecaster:
    """Answers for one model; dry runs are kept, since most questions share one."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._runs: dict[FineTune, tuple[Any, Step]] = {}

    def answer(self, job: FineTune, site: Site, budget: Budget, chunk_bytes: int = 0) -> Answer:
        """The forecast of a job on a machine, within budgets. Raises OffloadError."""
        model, step = self._run(replace(job, compute_dtype=None))
        where = outline_of(model, job, budget.host_bytes, chunk_bytes)
        need = self._need(job, model, step, budget) if budget.device_bytes is not None else None
        return _Question(job, site, budget, where, step, need).answer()

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

    def _need(self, job: FineTune, model: Any, step: Step, budget: Budget) -> Need:
        assert budget.device_bytes is not None
        frames = job.compute_dtype or job.dtype
        if frames != job.dtype:
            _, step = self._run(replace(job, dtype=frames, compute_dtype=None))
        itemsize = {n: (_BYTES_OF[frames] if p.is_floating_point() else p.element_size())
                    for n, p in model.named_parameters()}  # fmt: skip
        chunk = max(min(budget.device_bytes // 16, _DEVICE_CHUNK_BYTES), 1)
        peak = up = down = most = 0
        last: tuple[Any, ...] = ()
        numels = {n: p.numel() for n, p in model.named_parameters()}
        for event in step.events:
            last = () if event.ends_forward else last  # frames do not outlive a pass
            size = sum(numels[n] * itemsize[n] for n in {span[0] for span in event.needs})
            grad = numels[event.gradient] * itemsize[event.gradient] if event.gradient else 0
            if event.needs and event.needs != last:
                up, last = up + size, event.needs
            down += grad
            frame = max(size, min(chunk, sum(numels.values()))) if event.needs else 0
            most = max(most, event.other_bytes)
            peak = max(peak, 2 * frame + event.other_bytes + grad)
        buffers = sum(b.numel() * b.element_size() for b in model.buffers())
        return Need(peak + buffers, most, up, down, buffers)


class _Question:
    """One job, one machine, one budget."""

    def __init__(
        self, job: FineTune, site: Site, budget: Budget, where: Outline, step: Step,
        need: Need | None,
    ) -> None:  # fmt: skip
        self.job, self.site, self.budget = job, site, budget
        self.where, self.step, self.need = where, step, need
        kept = kept_bytes_for(budget.host_bytes) - FREE_KEPT_BYTES
        self.fixed_bytes = where.fixed_bytes + kept
        self.notes: list[str] = []

    def answer(self) -> Answer:
        where, trace = self.where, self._trace()
        other = max(m.other_bytes for m in trace.moments)
        whole = where.total_bytes + self.fixed_bytes + other
        spills = whole > self.budget.host_bytes
        capacity = self.budget.host_bytes - self.fixed_bytes
        needed, forecast, there = self._least_bytes(), None, frozenset[int]()
        try:
            made = plan(trace, self.site.machine, max(capacity, 0))
            forecast, there = made.forecast, resident_behind_passes(trace, made)
        except DoesNotFit as error:
            needed = max(needed, error.smallest_bytes + self.fixed_bytes)
        tiers = self._tiers(trace, needed, whole if not spills else 0, forecast)
        fits = forecast is not None and all(t.spare_bytes >= 0 for t in tiers.values())
        pace = self._pace(trace, forecast) if fits and forecast is not None else None
        return Answer(
            sum(sum(f.weights.layout.numels) for f in where.families),
            sum(sum(f.weights.layout.numels) for f in where.families if f.trained),
            self._kinds(there, other, spills=spills), tiers, pace,
            where.chunk_bytes, spills, tuple(self.notes),
        )  # fmt: skip

    # -- the step ---------------------------------------------------------------------------

    def _trace(self) -> Trace:
        on_device, early = self.need is not None, self.job.in_backward
        coding_s = self.site.coding_s_per_byte if self.job.state_dtype is not None else 0.0
        trace = self._write(Setting(early, on_device, coding_s))
        if early:
            other = max(m.other_bytes for m in trace.moments)
            fits = self.where.total_bytes + other + self.fixed_bytes <= self.budget.host_bytes
            plain = self._write(Setting(False, on_device, coding_s))
            room = self.budget.host_bytes - self.fixed_bytes
            lacking = update_needed_bytes(plain, self.where) - room
            if fits or lacking > 0:
                why = "all stays in memory" if fits else f"{format_size(lacking)} are lacking"
                self.notes.append(f"the update in the backward pass would be off: {why}")
                return plain
        return trace

    def _write(self, setting: Setting) -> Trace:
        trace = synthesise(self.step, self.where, self.site.processor, setting)
        return trace if self.need is None else self._slowed(trace, self.need)

    def _slowed(self, trace: Trace, need: Need) -> Trace:
        """Passes last as long as the slowest of products, uploads and downloads."""
        inside = {Phase.FORWARD, Phase.BACKWARD}
        work_s = sum(m.compute_s for m in trace.moments if m.phase in inside)
        link_s = max(need.up_bytes / max(self.site.machine.h2d_bytes_per_s, 1.0),
                     need.down_bytes / max(self.site.machine.d2h_bytes_per_s, 1.0))  # fmt: skip
        factor = max(link_s / work_s, 1.0) if work_s else 1.0
        moments = tuple(
            replace(m, compute_s=m.compute_s * factor) if m.phase in inside else m
            for m in trace.moments
        )
        return replace(trace, moments=moments)

    def _pace(self, trace: Trace, forecast: Forecast) -> Pace:
        machine, moments = self.site.machine, trace.moments
        passes = sum(m.compute_s for m in moments if not m.phase.updates)
        lanes = {
            "disk read": forecast.read_bytes / machine.read_bytes_per_s,
            "disk write": forecast.write_bytes / machine.write_bytes_per_s,
            "compute": passes,
            "update": sum(m.compute_s for m in moments if m.phase.updates),
        }
        if self.need is not None:
            lanes["compute"] = sum(self.site.processor.work_s(Phase.FORWARD, e.work)
                                   for e in self.step.events)  # fmt: skip
            lanes["host to device"] = self.need.up_bytes / max(machine.h2d_bytes_per_s, 1.0)
            lanes["device to host"] = self.need.down_bytes / max(machine.d2h_bytes_per_s, 1.0)
        rest = {n: s for n, s in lanes.items() if not n.startswith("disk")}
        binding = "disk" if forecast.binding == "disk" else max(rest, key=lambda n: rest[n])
        step_s = forecast.step_s * self.site.processor.effort.beyond
        return Pace(
            step_s, forecast.bound_s, binding, self.job.tokens / step_s, lanes,
            forecast.read_bytes, forecast.write_bytes,
        )  # fmt: skip

    # -- bytes ------------------------------------------------------------------------------

    def _least_bytes(self) -> int:
        """What ``offload.wrap`` refuses before anything is moved."""
        where = self.where
        largest = max(
            n * f.weights.itemsize for f in where.families for n in f.weights.layout.numels
        )
        least = max(largest + where.chunk_bytes, where.copies * where.chunk_bytes)
        return max(least, self.fixed_bytes)

    def _tiers(
        self, trace: Trace, needed: int, whole: int, forecast: Forecast | None
    ) -> dict[str, Tier]:
        budget, where = self.budget, self.where
        needs = [sum(trace.chunk_bytes[n.chunk] for n in m.needs) + m.other_bytes
                 for m in trace.moments]  # fmt: skip
        needed = max(needed, max(needs) + self.fixed_bytes)
        peak = whole or (forecast.peak_bytes + self.fixed_bytes if forecast else needed)
        found = {"host": Tier(budget.host_bytes, needed, peak)}
        if self.need is not None and budget.device_bytes is not None:
            need = self.need.peak_bytes
            found = {"device": Tier(budget.device_bytes, need, max(need, budget.device_bytes)),
                     **found}  # fmt: skip
        if not whole:
            total = where.total_bytes
            found["disk"] = Tier(
                total if budget.disk_bytes is None else budget.disk_bytes, total, total
            )
        return found

    def _kinds(self, there: frozenset[int], other: int, *, spills: bool) -> dict[str, Holding]:
        found: dict[str, Holding] = {}
        for name, (size, placed) in self.where.by_kind().items():
            held = sum(self._resident(name, there)) if spills else placed
            found[name] = Holding(size, placed - size, 0, held, placed if spills else 0)
        where = Holding(other, host=other)
        if self.need is not None:
            saved = self.need.activation_bytes
            frames = self.need.peak_bytes - saved - self.need.buffer_bytes
            found["frames"] = Holding(frames, device=frames)
            found["activations"] = Holding(saved, device=saved)
            found["gradients in flight"] = where
        else:
            found["activations"] = where
        buffers = self.need.buffer_bytes if self.need is not None else 0
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
