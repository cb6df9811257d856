"""What a run is given: budgets as the user wrote them, and the few internals that tests set."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from offload.errors import OffloadError
from offload.spare import free_memory_bytes
from offload.tiers.spec import Budget, Machine, parse_size

if TYPE_CHECKING:
    from offload.place import Place

ACTIVATIONS = ("auto", "keep", "recompute", "swap")
HEADROOM_SHARE = 0.8  # of what is free, when no budget is given

Size = int | str


@dataclass(frozen=True, slots=True)
class Tuning:
    """Internals with good defaults: for tests, benchmarks and the curious.

    ``chunk_bytes``: None chooses from the budget. ``prefetch`` False runs every step on demand.
    ``machine``: measured rates; None probes once per machine and folder. ``poison`` fills freed
    frames with NaN. ``adversary``: seed of lanes that complete out of order. ``keep_hooks``:
    stay in the managed mode although everything fits. ``emulate_device``: compute in frames of a
    separate arena in host memory; ``device_chunk_bytes``: how much neighbours that share a frame
    may take. ``trust_versions``: copies on the device outlive passes; writes to weights through
    ``.data`` or numpy are then not seen before the next update. ``tapes``: what each planned step
    does is noted, for ``runtime.report``; what that costs is in bench/recording.py. ``residents``:
    weights for which the device has room live and are updated there (offload/residents.py); on
    CUDA, whose kernels round otherwise than the CPU's, numbers then depend on ``device_memory``.
    ``disk_io``: "direct", or "kvikio", which needs the extra ``gds`` and a CUDA driver.
    """

    chunk_bytes: int | None = None
    prefetch: bool = True
    machine: Machine | None = None
    poison: bool = False
    adversary: int | None = None
    keep_hooks: bool = False
    emulate_device: bool = False
    device_chunk_bytes: int | None = None
    trust_versions: bool = False
    tapes: bool = True
    residents: bool = True
    disk_io: str = "direct"


@dataclass(frozen=True, slots=True)
class Given:
    """Budgets in bytes and the folder of the disk tier."""

    budget: Budget
    disk: Path | None
    chosen: tuple[str, ...]  # budgets that were not given, as lines to tell the user
    place: Place | None = None  # compute in frames; None: where the weights are
    activations: str = "keep"  # what becomes of saved tensors: auto, keep, recompute or swap


def understand(
    host_memory: Size | None,
    disk: str | os.PathLike[str] | None,
    disk_memory: Size | None,
    device_memory: Size | None,
) -> Given:
    """Parse what ``wrap`` was given; take what is free where nothing was. Raises OffloadError."""
    try:
        host = None if host_memory is None else parse_size(host_memory)
        disk_bytes = None if disk_memory is None else parse_size(disk_memory)
        device = None if device_memory is None else parse_size(device_memory)
    except ValueError as error:
        raise OffloadError(str(error)) from error
    folder = None if disk is None else Path(disk)
    if folder is None and disk_bytes:
        raise OffloadError("disk_memory is given but no disk=... folder to use it in")
    chosen = []
    if host is None:
        host = int(HEADROOM_SHARE * free_memory_bytes())
        chosen.append(f"host_memory={host} (80% of what is free)")
    return Given(Budget(host, device, disk_bytes), folder, tuple(chosen))


def with_activations(given: Given, setting: str) -> Given:
    """The same with what becomes of saved activations. Raises OffloadError for odd settings."""
    if setting not in ACTIVATIONS:
        raise OffloadError(f"activations={setting!r}: give one of {', '.join(ACTIVATIONS)}")
    to_host = given.place is not None and given.place.own_memory
    if setting == "swap" and given.disk is None and not to_host:
        raise OffloadError('activations="swap" needs a disk=... folder to swap to')
    return replace(given, activations=setting)
