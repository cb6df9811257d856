"""The whole machine, for ``offload probe``: each lane alone, and the pairs that share something.

The planner needs little of this (`probe.probe_machine`, seconds at the first run). The rest says
what a machine can do: a product, the optimizer's update, which shares DRAM and cores with memory
copies, and the two directions of the link to a GPU.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offload.tiers import probe
from offload.tiers.spec import MIB, Machine

COPY_BYTES = 64 * MIB  # more than most caches hold
UPDATE_PARAMS = 8 << 20  # with gradient and two moments 128 MiB
PRODUCT_SIDE = 1024
LINK_BYTES = 64 * MIB
ALONE_S, ROUNDS = 0.3, 3  # a round measures each work alone, then both


@dataclass(frozen=True, slots=True)
class Pair:
    """Two lanes that share something: what each moves in a second, alone and beside the other.

    ``unit``: of both first and second; "B" for bytes, or what is counted.
    """

    lanes: tuple[str, str]
    units: tuple[str, str]
    alone_per_s: tuple[float, float]
    beside_per_s: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was measured. ``threads``: of torch; ``device``: the GPU's name, None without one.

    ``pairs``: the disk's two directions; a copy (one thread) and the update (fused float32 AdamW,
    torch's threads, in parameters); with a GPU the link's two directions, from pinned memory.
    """

    machine: Machine
    product_flops_per_s: float
    pairs: tuple[Pair, ...]
    threads: int
    device: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


Work = Callable[[], float]  # does it once, and says how much that was


def survey(folder: Path) -> Survey:
    """Measure; some ten seconds. Raises DiskFull where half a GiB cannot be had in ``folder``."""
    machine = probe.probe_machine(folder)
    disk = Pair(
        ("disk read", "disk write"), ("B", "B"),
        (machine.read_bytes_per_s, machine.write_bytes_per_s),
        (machine.mixed_read_bytes_per_s, machine.mixed_write_bytes_per_s),
    )  # fmt: skip
    pairs = [disk, _measured(("memory copy", "update"), ("B", "params"), [_copy(), _update()])]
    device = None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        pairs.append(_measured(("to the GPU", "from the GPU"), ("B", "B"), _link()))
        to, back = pairs[-1].alone_per_s
        machine = replace(machine, h2d_bytes_per_s=to, d2h_bytes_per_s=back)
    flops = statistics.median(rates([_product()])[0] for _ in range(ROUNDS))
    return Survey(machine, flops, tuple(pairs), torch.get_num_threads(), device)


def surveyed_at(folder: Path) -> Path:
    """Where the survey of a folder's device is kept: beside the rates that the planner uses."""
    return probe.remembered_at(folder, "survey")


def remember(folder: Path, found: Survey) -> Path | None:
    """Keep a survey, and the machine for the planner. Where; None: that was not possible."""
    probe.remember(folder, found.machine)
    kept = surveyed_at(folder)
    return kept if probe.keep(kept, found.to_dict()) else None


def rates(works: Sequence[Work], seconds: float = ALONE_S) -> list[float]:
    """What each work does in a second while all of them are repeated, in threads of their own."""
    end_s = time.perf_counter() + seconds

    def repeat(work: Work) -> float:
        begin_s, done = time.perf_counter(), 0.0
        while True:
            done += work()
            now_s = time.perf_counter()
            if now_s >= end_s:
                return done / (now_s - begin_s)

    with ThreadPoolExecutor(len(works)) as pool:
        return [job.result() for job in [pool.submit(repeat, work) for work in works]]


def _measured(lanes: tuple[str, str], units: tuple[str, str], works: Sequence[Work]) -> Pair:
    """Medians of rounds; in each, both alone and then beside each other."""
    for work in works:
        work()  # the first one touches the memory
    found = [
        (*rates(works[:1]), *rates(works[1:]), *rates(works)) for _ in range(ROUNDS)
    ]  # fmt: skip
    a, b, beside_a, beside_b = (statistics.median(f[i] for f in found) for i in range(4))
    return Pair(lanes, units, (a, b), (beside_a, beside_b))


def _copy() -> Work:
    """One thread's, as the lanes copy. ctypes lets go of the interpreter meanwhile."""
    source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(2))

    def copy() -> float:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), COPY_BYTES)
        return COPY_BYTES

    return copy


def _update() -> Work:
    """Parameters stepped by AdamW."""
    param = torch.nn.Parameter(torch.ones(UPDATE_PARAMS))
    param.grad = torch.full_like(param, 1e-3)
    optimizer = torch.optim.AdamW([param], lr=1e-6, fused=True)

    def update() -> float:
        optimizer.step()
        return UPDATE_PARAMS

    return update


def _product() -> Work:
    """Floating-point operations of float32 products."""
    a, b, out = (torch.ones(PRODUCT_SIDE, PRODUCT_SIDE) for _ in range(3))

    def product() -> float:
        torch.mm(a, b, out=out)
        return 2.0 * PRODUCT_SIDE**3

    return product


def _link() -> list[Work]:
    """Copies to and from the GPU, each on a stream of its own."""

    def moving(to_device: bool) -> Work:
        host = torch.ones(LINK_BYTES, dtype=torch.uint8).pin_memory()
        device = torch.ones(LINK_BYTES, dtype=torch.uint8, device="cuda")
        stream = torch.cuda.Stream()
        target, source = (device, host) if to_device else (host, device)

        def move() -> float:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            stream.synchronize()
            return LINK_BYTES

        return move

    return [moving(True), moving(False)]
