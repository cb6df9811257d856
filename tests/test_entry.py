"""The command asks malloc for huge pages, once, where the system and the user leave it to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from offload import entry

SCRIPT = Path(sys.executable).parent / "offload"
SAYS = "import offload.cli, os; offload.cli.main = lambda: print(os.environ.get('GLIBC_TUNABLES'))"
ENTERS = f"{SAYS}; from offload.entry import main; main()"


def entered(**environment: str) -> str:
    """GLIBC_TUNABLES as the command finds it."""
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", ENTERS], env=kept | environment, capture_output=True, text=True,
        check=True, timeout=120,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.mark.skipif(not entry.can_ask(), reason="malloc or the system knows no such huge pages")
def test_the_command_runs_with_huge_pages_for_malloc() -> None:
    assert entered() == entry.TUNABLE
    assert entered(GLIBC_TUNABLES="glibc.malloc.check=0") == f"glibc.malloc.check=0:{entry.TUNABLE}"


def test_what_the_user_says_of_huge_pages_stays() -> None:
    assert entered(GLIBC_TUNABLES="glibc.malloc.hugetlb=0") == "glibc.malloc.hugetlb=0"


def test_where_nobody_gives_huge_pages_the_command_just_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pages = tmp_path / "enabled"
    pages.write_text("always madvise [never]\n")
    monkeypatch.setattr(entry, "_PAGES", pages)
    assert not entry.can_ask()
    pages.write_text("always [madvise] never\n")
    for found, can in ((("glibc", "2.36"), True), (("glibc", "2.31"), False), (("", ""), False)):
        monkeypatch.setattr("platform.libc_ver", lambda found=found: found)
        assert entry.can_ask() is can


def test_the_installed_command_passes_its_arguments_on() -> None:
    done = subprocess.run([SCRIPT, "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().count(".") == 2
