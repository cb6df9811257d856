"""Machines that a forecast may be for: those of a small table, a file, or this one, measured.

The table (offload/machines.json) has the figures of data sheets, each with its source. What a run
gets of them is less; the shares below are assumptions, for all machines of the table alike, and can
be given in a file (``"attained"``). This machine is measured instead: nothing is assumed for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from offload.errors import OffloadError
from offload.prefetch.generation import Rates
from offload.prefetch.trace import Phase
from offload.tiers.spec import Compute, Machine, parse_size

# What of a data sheet's figure is reached: products, memory, link, disk; of the disk's with both
# directions at once; and of memory by an update that is spread over all cores.
ATTAINED = {"flops": 0.5, "memory": 0.8, "link": 0.8, "disk": 0.85, "mixed": 0.5, "update": 0.6}
DTYPES = ("float32", "bfloat16")
_NUMBERS = ("memory_bytes_per_s", "host_bytes_per_s", "link_bytes_per_s",
            "disk_read_bytes_per_s", "disk_write_bytes_per_s")  # fmt: skip
_TOKENS = (1, 8, 32, 128, 512)


@dataclass(frozen=True, slots=True)
class Effort:
    """What a step takes beyond the roofline and what the engine adds, measured on a small run.

    Factors on the time of the roofline (`Processor`) by phase; the engine's own seconds for each
    byte of the chunks that a moment needs; and a factor on whole steps as they are replayed.
    """

    factor: Mapping[Phase, float] = field(default_factory=dict)
    handling_s_per_byte: Mapping[Phase, float] = field(default_factory=dict)
    beyond: float = 1.0


@dataclass(frozen=True, slots=True)
class Processor:
    """What computes: an operation takes the longer of its arithmetic and its bytes.

    That is the roofline model (Williams et al. 2009). ``update_bytes_per_s``: of weights, gradients
    and state that the optimizer reads and writes, on the host. Implements `synthesis.Pace`.
    """

    flops_per_s: float
    bytes_per_s: float
    update_bytes_per_s: float
    effort: Effort = field(default_factory=Effort)

    def work_s(self, phase: Phase, work: Iterable[tuple[float, float]]) -> float:
        """Seconds of operations of (floating-point operations, bytes) each."""
        flops_per_s, bytes_per_s = self.flops_per_s, self.bytes_per_s
        lone_s = sum(max(f / flops_per_s, b / bytes_per_s) for f, b in work)
        return lone_s * self.effort.factor.get(phase, 1.0)

    def update_s(self, phase: Phase, size_bytes: int) -> float:
        """Seconds in which the optimizer goes through so many bytes."""
        return size_bytes / self.update_bytes_per_s * self.effort.factor.get(phase, 1.0)

    def handling_s(self, phase: Phase, size_bytes: int) -> float:
        """The engine's own seconds for needs of so many bytes."""
        return size_bytes * self.effort.handling_s_per_byte.get(phase, 0.0)


@dataclass(frozen=True, slots=True)
class Site:
    """A machine, with all that a forecast asks of it. Bytes, and bytes per second, as attained.

    ``device_bytes`` None: the host computes. ``endurance_bytes``: what the drive is guaranteed to
    take in its life, None where unknown. ``coding_s_per_byte``: what each stored byte of narrower
    state takes beside what the processor's effort was measured with.
    """

    name: str
    machine: Machine
    processor: Processor
    host_bytes: int
    device_bytes: int | None = None
    disk_bytes: int | None = None
    endurance_bytes: float | None = None
    coding_s_per_byte: float = 0.0


def known_machines() -> dict[str, dict[str, Any]]:
    """The table, by name."""
    text = resources.files("offload").joinpath("machines.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def read_machine(name: str) -> dict[str, Any]:
    """An entry of the table, or of a JSON file. Raises OffloadError."""
    table = known_machines()
    if name in table:
        return table[name]
    try:
        found = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OffloadError(
            f"plan: no rates in {name} ({error!r}): give a JSON file with the fields of "
            f"docs/plan.md, or one of {', '.join(table)}"
        ) from error
    if not isinstance(found, dict):
        raise OffloadError(f"plan: no rates in {name}: it should hold one JSON object")
    return found


def site_of(name: str, entry: Mapping[str, Any], dtype: str) -> Site:
    """An entry as a forecast wants it, for products in ``dtype``. Raises OffloadError."""
    try:
        shares = ATTAINED | dict(entry.get("attained", {}))
        flops = float(entry["flops_per_s"][dtype])
        memory, host, link, read, write = (float(entry[n]) for n in _NUMBERS)
        device = entry.get("device_memory")
        disk = entry.get("disk_memory")
        endurance = entry.get("disk_endurance_bytes")
        sizes = [None if s is None else parse_size(s) for s in (entry["host_memory"], device, disk)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OffloadError(
            f"plan: the machine {name} cannot be used ({error!r}); docs/plan.md has its fields"
        ) from error
    if min(flops, memory, host, read, write) <= 0 or not sizes[0]:
        raise OffloadError(f"plan: the machine {name} has a rate or memory that is not positive")
    read, write, link = read * shares["disk"], write * shares["disk"], link * shares["link"]
    mixed = shares["mixed"]
    machine = Machine(
        read, write, read * mixed, write * mixed, host * shares["update"] / 2, link, link
    )
    processor = Processor(flops * shares["flops"], memory * shares["memory"],
                          host * shares["update"])  # fmt: skip
    return Site(
        name, machine, processor, sizes[0], sizes[1], sizes[2],
        None if endurance is None else float(endurance),
    )  # fmt: skip


def rates_of(site: Site, itemsize: int) -> Rates:
    """The same for generation: products of so many tokens from the roofline."""
    found = compute_of(site.processor, itemsize)
    if site.device_bytes is None:
        return Rates(site.machine, found)
    host = Processor(site.processor.update_bytes_per_s, site.processor.update_bytes_per_s, 1.0)
    return Rates(site.machine, compute_of(host, itemsize), found)


def compute_of(processor: Processor, itemsize: int) -> Compute:
    """Seconds for each weight of a product, as `Compute` has them."""
    points = tuple(
        (t, max(2.0 * t / processor.flops_per_s, itemsize / processor.bytes_per_s)) for t in _TOKENS
    )
    return Compute(points, processor.bytes_per_s)
