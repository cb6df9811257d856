"""Plain data about tiers: names, sizes, measured rates. No torch, no I/O."""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}{s}": 1 << (10 * (i + 1)) for i, p in enumerate("KMGT") for s in ("", "IB")}
_UNITS |= {f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGT")}


class Tier(StrEnum):
    """A place that holds bytes. On a CPU-only machine the compute tier is HOST."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


def parse_size(size: int | str) -> int:
    """Bytes of ``8 * 2**30``, ``"8GiB"``, ``"500 MiB"``, ``"1.5GB"`` (decimal) or ``"64M"``.

    Raises ValueError for anything else, with an example of what is understood.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise ValueError(f"a size cannot be negative: {size}")
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"not a size: {size!r}; write an int of bytes or e.g. '8GiB', '500MiB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_size(size_bytes: float) -> str:
    """A size for people: GiB, MiB or KiB."""
    if abs(size_bytes) >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    if abs(size_bytes) >= MIB:
        return f"{size_bytes / MIB:.1f} MiB"
    return f"{size_bytes / KIB:.1f} KiB"


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Budget:
    """What the run may hold in each tier, in bytes. ``None``: that tier is not used."""

    host_bytes: int
    device_bytes: int | None = None
    disk_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """Measured rates of one machine, bytes per second. Serialisable as JSON.

    The disk's two directions share one drive: ``mixed_*`` are the rates that each direction
    reaches while the other runs too. Host copies (``copy``) share DRAM with everything.
    ``beside_share``: the part of its rates, whichever, that the disk keeps while all cores compute.
    """

    read_bytes_per_s: float
    write_bytes_per_s: float
    mixed_read_bytes_per_s: float
    mixed_write_bytes_per_s: float
    copy_bytes_per_s: float
    h2d_bytes_per_s: float = 0.0
    d2h_bytes_per_s: float = 0.0
    disk_latency_s: float = 1e-4
    beside_share: float = 1.0

    def disk_s(self, read_bytes: float, write_bytes: float) -> float:
        """Least seconds in which the drive can move both, with both directions in flight.

        The drive runs at the joint rates while both directions have work, then the longer
        direction finishes alone. Never less than an interleaving of the lone rates would
        need where joint running is a loss: a scheduler may also run them one by one.
        """
        alone_s = read_bytes / self.read_bytes_per_s + write_bytes / self.write_bytes_per_s
        both_s = min(
            read_bytes / self.mixed_read_bytes_per_s, write_bytes / self.mixed_write_bytes_per_s
        )
        rest_read = read_bytes - both_s * self.mixed_read_bytes_per_s
        rest_write = write_bytes - both_s * self.mixed_write_bytes_per_s
        joint_s = both_s + rest_read / self.read_bytes_per_s + rest_write / self.write_bytes_per_s
        return min(alone_s, joint_s)

    def to_dict(self) -> dict[str, float]:
        """The fields as plain numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Compute:
    """Measured rates of a processor for one weight type.

    ``product_s``: (tokens, seconds for each weight of a product with so many tokens), ascending;
    the first is a product with one vector. ``attend_bytes_per_s``: keys and values that attention
    for one token goes through, joining the new token to them included. Where the processor shares
    cores and DRAM with the disk: ``drag``: seconds that each lone second of reading takes from the
    processor; ``disk_drag``: seconds that each lone second of computing takes from reading.
    ``handling_s``: of each layer in a pass in which weights come and go, beside its products;
    ``pass_s``: of each pass beside its layers.
    """

    product_s: tuple[tuple[int, float], ...]
    attend_bytes_per_s: float
    drag: float = 0.0
    disk_drag: float = 0.0
    handling_s: float = 0.0
    pass_s: float = 0.0

    def __post_init__(self) -> None:
        tokens = [t for t, _ in self.product_s]
        if not tokens or tokens != sorted(set(tokens)) or tokens[0] < 1:
            raise ValueError(f"products must be for ascending numbers of tokens, not {tokens}")
        if not (0 <= self.disk_drag <= 1 and self.drag >= 0):
            raise ValueError("disk_drag must be at least 0 and at most 1, and drag at least 0")

    def weight_s(self, tokens: float) -> float:
        """Seconds for each weight of a product with so many tokens: linear between measurements.

        Beyond the last one each token takes as long as in that; below the first, all of it.
        """
        points = self.product_s
        at = bisect_left([t for t, _ in points], tokens)
        if at == 0:
            return points[0][1]
        if at == len(points):
            return points[-1][1] * tokens / points[-1][0]
        (t0, s0), (t1, s1) = points[at - 1], points[at]
        return s0 + (s1 - s0) * (tokens - t0) / (t1 - t0)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(found: dict[str, Any]) -> Compute:
        """From ``to_dict``. Raises TypeError, KeyError or ValueError for anything else."""
        points = tuple((int(t), float(s)) for t, s in found["product_s"])
        costs = ("drag", "disk_drag", "handling_s", "pass_s")  # never assumed
        return Compute(
            **(found | {"product_s": points} | {name: float(found[name]) for name in costs})
        )
