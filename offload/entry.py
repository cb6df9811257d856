"""Where the ``offload`` command begins: malloc is to use huge pages, which it learns at its start.

Gradients and activations come from malloc. Within a budget their pages go back to the system and
are faulted in anew, 4 KiB at a time; with huge pages a step is some percent shorter
(bench/startup.py). glibc (2.35 and later) asks its environment once, before any code of ours, so
the command runs itself again with that said: a few hundredths of a second, before torch is
imported.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
_NAME = "GLIBC_TUNABLES"
_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def unsaid(environment: Mapping[str, str]) -> dict[str, str]:
    """What the environment is to say; nothing where it says something of huge pages."""
    given = environment.get(_NAME, "")
    if "glibc.malloc.hugetlb" in given or not can_ask():
        return {}
    return {_NAME: f"{given}:{TUNABLE}" if given else TUNABLE}


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
    added = unsaid(os.environ)
    if added:
        os.environ.update(added)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    from offload.cli import main as run

    run()
