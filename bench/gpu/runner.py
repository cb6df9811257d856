"""Runs parts of tasks in processes of their own, within a time, and remembers what is done.

Needs no torch. A task prints rows as it goes, so what it had found when it was cut is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROW = "ROW "  # a task's line on stdout that is kept; others are its log
ENDED = ("done", "failed", "not run")  # a task with one of these is not run again
CUTS = 2  # a task that was cut so often is not tried again
LEAST_S = 5.0  # of a part's time, to begin another task
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One process. ``not_run``: why it cannot be run here; "" where it can."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    not_run: str = ""


@dataclass(frozen=True)
class Part:
    """Tasks that belong together, all within ``limit_s``."""

    number: int
    name: str
    title: str
    tasks: tuple[Task, ...]
    limit_s: float = 540.0


@dataclass
class State:
    """What has been found so far, in ``folder``/state.json; written after every row's task."""

    folder: Path
    tasks: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> State:
        """What an earlier run has left there."""
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "state.json"
        return cls(folder, json.loads(kept.read_text()) if kept.exists() else {})

    def get(self, part: Part, task: Task) -> Row:
        return self.tasks.get(f"{part.name}/{task.name}", {"status": "", "cuts": 0, "rows": []})

    def over(self, part: Part, task: Task) -> bool:
        """Whether there is nothing left to do."""
        known = self.get(part, task)
        return known["status"] in ENDED or known["cuts"] >= CUTS

    def finished(self, part: Part) -> bool:
        return all(self.over(part, task) for task in part.tasks)

    def put(self, part: Part, task: Task, row: Row) -> None:
        """Keep it; the file is whole at every moment."""
        self.tasks[f"{part.name}/{task.name}"] = row
        fresh = self.folder / "state.json.new"
        fresh.write_text(json.dumps(self.tasks, indent=1))
        fresh.replace(self.folder / "state.json")

    def forget(self, part: Part) -> None:
        for task in part.tasks:
            self.tasks.pop(f"{part.name}/{task.name}", None)


def run_part(
    part: Part, state: State, environment: dict[str, str], say: Callable[[str], None]
) -> bool:
    """Run what is left of a part; whether nothing failed and nothing was cut."""
    ends_s, good = time.monotonic() + part.limit_s, True
    for task in part.tasks:
        if state.over(part, task):
            continue
        left_s = ends_s - time.monotonic()
        if left_s < LEAST_S:
            say(f"  {task.name}: no time left in this part; run it again")
            good = False
            continue
        cuts = state.get(part, task)["cuts"]
        limit_s = min(task.limit_s * (1 + cuts), left_s)  # more time, where it was too little
        found = run_task(task, limit_s, environment, log_of(state.folder, part, task))
        found["cuts"] = cuts + (found["status"] == "cut")
        state.put(part, task, found)
        say(f"  {task.name}: {told(found)}")
        good &= found["status"] in ("done", "not run")
    return good


def log_of(folder: Path, part: Part, task: Task) -> Path:
    """Where a task's log goes: a name of letters, digits, dots and dashes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{part.name}-{task.name}")
    return folder / "logs" / f"{name}.log"


def run_task(task: Task, limit_s: float, environment: dict[str, str], log: Path) -> Row:
    """Its rows and how it ended: done, failed, cut or not run."""
    if task.not_run:
        return {"status": "not run", "why": task.not_run, "rows": [], "seconds": 0.0}
    log.parent.mkdir(exist_ok=True)
    began_s, rows = time.monotonic(), list[Row]()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            task.command, stdout=subprocess.PIPE, stderr=errors, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            in_time = _read_rows(process, began_s + limit_s, rows, errors)
        finally:
            _end(process)
    seconds = round(time.monotonic() - began_s, 1)
    if not in_time:
        why = f"cut after {seconds:.0f} s"
        return {"status": "cut", "why": why, "rows": rows, "seconds": seconds}
    if process.returncode:
        why = _last_error(log, process.returncode)
        return {"status": "failed", "why": why, "rows": rows, "seconds": seconds}
    return {"status": "done", "rows": rows, "seconds": seconds}


def _read_rows(process: Any, ends_s: float, rows: list[Row], log: Any) -> bool:
    """Take in lines until the process closes its output; False when its time is over first."""
    os.set_blocking(process.stdout.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        rest = b""
        while True:
            left_s = ends_s - time.monotonic()
            if left_s <= 0 or not selector.select(left_s):
                return False
            block = process.stdout.read()
            if not block:
                process.wait()
                return True
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if line.startswith(ROW.encode()):
                    rows.append(json.loads(line[len(ROW) :]))
                else:
                    log.write(line + b"\n")


def _end(process: Any) -> None:
    """End a process with all that it started."""
    with contextlib.suppress(ProcessLookupError):  # it has ended, and left nothing behind
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def _last_error(log: Path, code: int) -> str:
    lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if "Error" in x]
    return lines[-1][:400] if lines else f"ended with status {code}"


def told(found: Row) -> str:
    """A task's result as one line."""
    if found["status"] != "done":
        return f"{found['status']}: {found['why']}"
    told_of = [row["says"] for row in found["rows"] if "says" in row]
    return f"done in {found['seconds']:.0f} s" + (f": {'; '.join(told_of)}" if told_of else "")


def line(row: Row) -> None:
    """Printed by a task: a row that is kept."""
    print(ROW + json.dumps(row), flush=True)


def python(file: str, *args: str) -> tuple[str, ...]:
    """The command of a task in this folder."""
    return (sys.executable, str(Path(__file__).parent / file), *args)
