"""What memory is left: the cgroup's word counts where it is the least."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from offload.spare import free_memory_bytes
from offload.tiers.spec import MIB

GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def small_group() -> Iterator[Path]:
    group = GROUPS / f"offload-spare-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no writable v1 memory cgroup: {error}")
    (group / "memory.limit_in_bytes").write_text(str(300 * MIB))
    yield group
    group.rmdir()


def test_the_machine_limits_it() -> None:
    assert 0 < free_memory_bytes() <= psutil.virtual_memory().total


@pytest.mark.cgroup
def test_so_does_a_group_of_ones_own(small_group: Path) -> None:
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from offload.spare import free_memory_bytes; print(free_memory_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_group / "cgroup.procs")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 200 * MIB < int(done.stdout) <= 300 * MIB
