"""One line of a results file: what was asked, on which machine, with which versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "numpy")


def machine() -> dict[str, Any]:
    """What kind of machine this is; nothing that names it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
         if x.startswith("model name")), platform.machine(),
    )  # fmt: skip
    cores, kernel = os.cpu_count(), os.uname().release
    return {"cores": cores, "memory_bytes": total, "cpu": cpu, "kernel": kernel}


def append(bench: str, disk: Path | None, **values: Any) -> None:
    """Append to ``results/<bench>.jsonl``; the disk folder's name is left out of the command."""
    command = " ".join(["bench/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    if disk is not None:
        command = command.replace(str(disk), "DIR")
    line = {
        "bench": bench, **values, "machine": machine(), "command": command,
        "versions": {p: importlib.metadata.version(p) for p in PACKAGES}
        | {"python": platform.python_version()},
    }  # fmt: skip
    with (RESULTS / f"{bench}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
