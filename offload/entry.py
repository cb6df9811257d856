"""Where the ``offload`` command begins: what libraries ask the environment only as they start.

[Note: malloc]
Gradients and activations come from malloc. Within a budget their pages go back to the system and
are faulted in anew, 4 KiB at a time. glibc (2.35 and later) takes huge pages if it is told before
any code of ours, so the command runs itself again with that said: a few hundredths of a second.

[Note: threads that spin]
Between two operations the threads of GNU OpenMP, torch's on Linux, wait for the next by spinning,
for some milliseconds. When the loop waits for a chunk, or moves pages, they keep from the cores
those who read, write and take checksums. They may spin for a few tenths of a millisecond here,
more than lies between two operations. (bench/startup.py measures both.)
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
SPINS = "10000"  # 30,000 and 3,000 are within 2% of it; the default is 300,000 (docs/log.md)
_MALLOC, _OPENMP = "GLIBC_TUNABLES", "GOMP_SPINCOUNT"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment. What it says of these things stays."""
    found = {}
    given = environment.get(_MALLOC, "")
    if "glibc.malloc.hugetlb" not in given and can_ask():
        found[_MALLOC] = f"{given}:{TUNABLE}" if given else TUNABLE
    if not {_OPENMP, "OMP_WAIT_POLICY"} & environment.keys():
        found[_OPENMP] = SPINS
    return found


def can_ask() -> bool:
    """Whether malloc knows of huge pages, and the system gives them to who asks."""
    library, version = platform.libc_ver()
    try:
        known = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
        return known and "[madvise]" in _PAGES.read_text()
    except (OSError, ValueError):
        return False


def main() -> None:
    """Run the command, in this process made anew where that helps."""
    added = settings(os.environ)
    os.environ.update(added)
    if _MALLOC in added:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from offload.cli import main as run

    run()
