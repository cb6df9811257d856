"""``offload plan --task finetune``: the forecast as tables for people, or JSON for scripts."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from offload.advise import advise
from offload.blueprint import FineTune
from offload.config import HEADROOM_SHARE, Size
from offload.forecast import Answer, Forecaster
from offload.machines import Effort, Site, read_machine, site_of
from offload.prefetch.advice import Change
from offload.spare import free_memory_bytes
from offload.tiers.spec import Budget, format_size, parse_size

DOES_NOT_FIT = 3  # exit status
_YEAR_DAYS = 365.25


@dataclass(frozen=True, slots=True)
class Means:
    """What a plan may use, as the user wrote it; None: what the machine has."""

    machine: str | None = None
    host_memory: Size | None = None
    device_memory: Size | None = None
    disk: str = "."
    disk_memory: Size | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All that is printed."""

    job: FineTune
    site: Site
    budget: Budget
    answer: Answer
    advice: list[Change]


def forecast(config: Any, job: FineTune, means: Means, *, advice: bool = True) -> Report:
    """Forecast a job on the machine asked for. Raises OffloadError, ValueError."""
    forecaster = Forecaster(config)

    def measured(other: FineTune) -> Site:
        return this_machine(config, forecaster, other, means)[0]

    if means.machine is not None:
        site = site_of(means.machine, read_machine(means.machine), job.compute_dtype or job.dtype)
        budget = _budget(means, site)
    else:
        site, budget = this_machine(config, forecaster, job, means)
    if budget.device_bytes is None and job.compute_dtype not in (None, job.dtype):
        raise ValueError(
            "--compute-dtype is for a GPU: the forecast for a processor computes in --dtype"
        )
    answer = forecaster.answer(job, site, budget)
    site_for = measured if means.machine is None else None
    found = advise(forecaster, job, site, budget, answer, site_for) if advice else []
    return Report(job, site, budget, answer, found)


def this_machine(
    config: Any, forecaster: Forecaster, job: FineTune, means: Means
) -> tuple[Site, Budget]:
    """This machine, measured: the disk under a folder, and a small run of the same kind."""
    from offload.effort import cached_processor, sample_for
    from offload.tiers.probe import cached_probe

    folder = Path(means.disk).expanduser()
    machine = cached_probe(folder)
    host = _size(means.host_memory) or int(HEADROOM_SHARE * free_memory_bytes())
    disk = _size(means.disk_memory) or int(HEADROOM_SHARE * shutil.disk_usage(folder).free)
    share, chunk_bytes = forecaster.share(job, host)
    sample = sample_for(config, job, chunk_bytes, share)
    processor = cached_processor(sample, folder, machine)
    return Site("this machine", machine, processor, host, None, disk), Budget(host, None, disk)


def _budget(means: Means, site: Site) -> Budget:
    """The machine's memory, the system's share of the host left out, where none is given."""
    host = _size(means.host_memory) or int(HEADROOM_SHARE * site.host_bytes)
    device = site.device_bytes
    if device is not None:
        device = _size(means.device_memory) or int(HEADROOM_SHARE * device)
    disk = _size(means.disk_memory)
    if disk is None and site.disk_bytes is not None:
        disk = int(HEADROOM_SHARE * site.disk_bytes)
    return Budget(host, device, disk)


def _size(size: Size | None) -> int | None:
    return parse_size(size) if size is not None else None


def to_json(report: Report) -> str:
    """One JSON object; bytes, seconds and days in the names. docs/plan.md says what they are."""
    answer, site = report.answer, report.site
    found = {
        "task": "finetune",
        "fits": answer.fits,
        "job": asdict(report.job),
        "budget": asdict(report.budget),
        "parameters": answer.parameters,
        "trained_parameters": answer.trained,
        "resident_bytes": answer.resident_bytes,
        "kinds": {name: asdict(held) for name, held in answer.kinds.items()},
        "tiers": {name: asdict(t) | {"spare_bytes": t.spare_bytes}
                  for name, t in answer.tiers.items()},
        "chunk_bytes": answer.chunk_bytes,
        "pace": asdict(answer.pace) if answer.pace else None,
        "written_bytes_a_day": answer.written_bytes_a_day,
        "drive_days": answer.drive_days(site.endurance_bytes),
        "advice": [
            {"change": c.what, "cost": c.cost.name.lower(), "tokens_per_s": c.then.tokens_per_s,
             "written_bytes_a_token": c.then.written_bytes_a_token}
            for c in report.advice
        ],
        "notes": list(answer.notes),
        "machine": _site_as_dict(site),
    }  # fmt: skip
    return json.dumps(found)


def _site_as_dict(site: Site) -> dict[str, Any]:
    from offload.effort import as_dict

    plain = replace(site.processor, effort=Effort())
    return asdict(replace(site, processor=plain)) | {"processor": as_dict(site.processor)}


def show(report: Report) -> None:
    """The tables."""
    from rich.console import Console

    console, answer = Console(), report.answer
    console.print(_verdict(report))
    console.print(_kinds_table(answer))
    console.print(_tiers_table(answer))
    for line in (*_pace_lines(report), *answer.notes):
        console.print(line)
    if report.advice:
        console.print(_advice_table(report))
    elif not answer.fits:
        console.print("none of the changes that were tried makes it fit")


def _verdict(report: Report) -> str:
    answer, job = report.answer, report.job
    what = f"LoRA of rank {job.rank}" if job.method == "lora" else "full fine-tuning"
    head = (
        f"{what} of {answer.parameters:,} parameters ({answer.trained:,} trained), {job.batch} x "
        f"{job.sequence} tokens a step, on {report.site.name}: "
    )
    if answer.fits:
        return head + "it fits"
    lacking = [f"{format_size(-t.spare_bytes)} of {name} memory"
               for name, t in answer.tiers.items() if t.spare_bytes < 0]  # fmt: skip
    return head + "it does NOT fit; lacking: " + ", ".join(lacking)


def _kinds_table(answer: Answer) -> Any:
    from rich.table import Table

    tiers = [t for t in ("device", "host", "disk") if t in answer.tiers]
    table = Table("bytes", "of elements", "padding", *(f"on {t}" for t in tiers))
    for name, held in answer.kinds.items():
        if held.size_bytes:
            table.add_row(name, format_size(held.size_bytes), format_size(held.padding_bytes),
                          *(format_size(getattr(held, t)) for t in tiers))  # fmt: skip
    return table


def _tiers_table(answer: Answer) -> Any:
    from rich.table import Table

    table = Table("tier", "budget", "least that works", "spare", "peak")
    for name, tier in answer.tiers.items():
        table.add_row(name, format_size(tier.given_bytes), format_size(tier.needed_bytes),
                      format_size(tier.spare_bytes), format_size(tier.peak_bytes))  # fmt: skip
    return table


def _pace_lines(report: Report) -> list[str]:
    answer, pace = report.answer, report.answer.pace
    if pace is None:
        return []
    lanes = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in pace.lanes.items())
    lines = [
        f"predicted: {pace.step_s:.3g} s a step, {pace.tokens_per_s:.4g} tokens/s; bound "
        f"{pace.bound_s:.3g} s; what binds: {pace.binding}",
        f"each lane by itself: {lanes}",
    ]
    if "device" in answer.tiers:
        lines.append(
            f"the bus: {format_size(pace.up_bytes)} up and {format_size(pace.down_bytes)} down a "
            f"step; on the device live {format_size(answer.resident_bytes)} of weights, gradients "
            "and state, which are updated there"
        )
    if pace.read_bytes or pace.write_bytes:
        line = (
            f"the disk: {format_size(pace.read_bytes)} read and {format_size(pace.write_bytes)} "
            f"written a step, {answer.written_bytes_a_day / 1e12:.3g} TB written a day"
        )
        days = answer.drive_days(report.site.endurance_bytes)
        if days is not None:
            long = f"{days:.0f} days" if days < 2 * _YEAR_DAYS else f"{days / _YEAR_DAYS:.1f} years"
            line += f": its guaranteed life in {long} without a pause"
        lines.append(line)
    return lines


def _advice_table(report: Report) -> Any:
    from rich.table import Table

    pace = report.answer.pace
    table = Table(
        "what would help, cheapest first", "costs", "tokens/s", "GB written a 1000 tokens"
    )
    for change in report.advice:
        then = change.then
        times = f" ({then.tokens_per_s / pace.tokens_per_s:.2f} x)" if pace else ""
        table.add_row(change.what, _COSTS[change.cost.name], f"{then.tokens_per_s:.4g}{times}",
                      f"{then.written_bytes_a_token / 1e6:.3g}")  # fmt: skip
    return table


_COSTS = {"NONE": "nothing: same numbers", "NUMBERS": "other numbers", "HARDWARE": "hardware"}
