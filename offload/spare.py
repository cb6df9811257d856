"""How much memory is left to this process: by the machine, and by the cgroups it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_LIMITS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory_bytes() -> int:
    """Memory this process may still take: the least that the machine or a cgroup above it leaves.

    Pages of files that were not used lately count as free, as the kernel gives them up first.
    """
    free_bytes = int(psutil.virtual_memory().available)
    return max(min([free_bytes, *(left for group in _groups() for left in _left(group))]), 0)


def _groups() -> Iterator[Path]:
    """Where this process's memory cgroups and those above may be mounted (v2 and v1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    yield from (_ROOT, _ROOT / "memory")  # within a container its own is mounted there
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        mount = _ROOT / controllers
        inside = Path(path.lstrip("/"))
        yield from (mount / p for p in (inside, *inside.parents) if p != Path("."))


def _left(group: Path) -> Iterator[int]:
    for limit, usage, idle in _LIMITS:
        try:
            limit_bytes = int((group / limit).read_text())
            used_bytes = int((group / usage).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not there; "max": without a limit
            continue
        yield limit_bytes - used_bytes + int(stat.get(idle, 0))
