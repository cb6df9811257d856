"""Contestants in processes of their own, taking turns on a machine that each has to itself.

All live at once, but only the one whose turn it is runs: the others are stopped (SIGSTOP), so that
no thread of theirs spins and no read-ahead of theirs goes on. A turn is some consecutive steps, of
which the first is not counted: it starts with queues that are not those of a steady loop. Rounds
of turns in shuffled order, so that a drift of the machine hits all alike. Who has
bounds is told the disk's rates before each turn: a bound is of the minute of its steps. Malloc uses
huge pages in all of them, as in the ``offload`` command (offload/entry.py), unless GLIBC_TUNABLES
says otherwise.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from child import anonymous_bytes

from offload.entry import TUNABLE

HUGE = {"GLIBC_TUNABLES": TUNABLE}
BOUNDS = ("bound_s", "wire_bound_s")
WARM_STEPS = 9  # one recorded, eight replayed; the plan is final after the seventh
Row = dict[str, Any]


class Rival:
    """One contestant's process and what was seen of it."""

    def __init__(self, name: str, command: list[str], limit_s: float) -> None:
        """Start it and wait until it is ready for its first turn."""
        self.name = name
        self.error: str | None = None
        self.events: list[Row] = []
        self.turns: list[list[Row]] = []
        self.peaks = {"life": 0, "steps": 0}
        self._limit_s = limit_s
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as this)
        env = {**HUGE, **os.environ, "PATH": f"{Path(command[0]).parent}:{os.environ['PATH']}"}
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                text=True, env=env,
            )  # fmt: skip
        except OSError as error:
            self.error = f"{type(error).__name__}: {error.strerror} ({Path(command[0]).name})"
            return
        self._until_turn_ends()
        self._signal(signal.SIGSTOP)

    @property
    def bounded(self) -> bool:
        """Whether it says how long a step must take at least."""
        return self.error is None and any(e.get("stats", {}).get("bound_s") for e in self.events)

    def turn(self, steps: int, rates: dict[str, float] | None = None, *, counted: bool) -> None:
        """Let it take some steps; the first of a counted turn is discarded."""
        if self.error is not None:
            return
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        seen = len(self.events)
        if rates is not None:
            self._process.stdin.write(json.dumps(rates) + "\n")
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self._until_turn_ends()
        self._signal(signal.SIGSTOP)
        if counted and self.error is None:
            self.turns.append([e for e in self.events[seen:] if "step_s" in e])

    def close(self) -> None:
        """End the process."""
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()

    def row(self) -> Row:
        """What is kept of it, as plain values; seconds, bytes."""
        if self.error is not None or not self.turns:
            return {"error": self.error or "took no counted step"}
        times = [[e["step_s"] for e in turn[1:]] for turn in self.turns]
        stats = [[e["stats"] for e in turn if e["stats"]] for turn in self.turns]
        return {
            "step_s": statistics.median(s for turn in times for s in turn),
            "turns_s": [statistics.median(turn) for turn in times],
            "turns_bounds": [{b: turn[-1][b] for b in BOUNDS} for turn in stats if turn],
            "turns_foretold_s": [turn[-1].get("foretold_s") for turn in stats if turn],
            "losses": [e["loss"] for e in self.events if "loss" in e][:4],
            "base_bytes": next(e["base_bytes"] for e in self.events if "base_bytes" in e),
            "peak_bytes": self.peaks["life"],
            "steps_peak_bytes": self.peaks["steps"],
            **({"stats": stats[-1][-1], "per_step": per_step(stats)} if stats[-1] else {}),
        }

    def _until_turn_ends(self) -> None:
        """Take in its lines until it says that the turn is over; watch its memory meanwhile."""
        assert self._process.stdout is not None
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,))
        watcher.start()
        deadline = threading.Timer(self._limit_s, self._process.kill)
        deadline.start()
        try:
            for line in self._process.stdout:
                if line.startswith("{"):
                    self.events.append(json.loads(line))
                    if "turn" in self.events[-1]:
                        return
            self.error = self._last_error()
        finally:
            deadline.cancel()
            over.set()
            watcher.join()

    def _watch(self, over: threading.Event) -> None:
        began = any("step_s" in e for e in self.events)
        while not over.wait(0.01):
            now = anonymous_bytes(self._process.pid)
            self.peaks["life"] = max(self.peaks["life"], now)
            if began:
                self.peaks["steps"] = max(self.peaks["steps"], now)

    def _last_error(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return f"killed: no answer within {self._limit_s:.0f} s"
        self._errors.seek(0)
        lines = [x.strip() for x in self._errors.read().splitlines() if "Error" in x]
        return lines[-1][:300] if lines else f"ended with exit code {code}"

    def _signal(self, what: signal.Signals) -> None:
        if self.error is None:
            self._process.send_signal(what)


def per_step(turns: list[list[Row]]) -> Row:
    """Means per counted step of counters that only grow, from the stats behind each step.

    What falls between two turns is left out: a lane that was stopped with its process would
    count that time as busy.
    """
    pairs = [(flat(a), flat(b)) for turn in turns for a, b in itertools.pairwise(turn)]
    return {key: statistics.mean(b[key] - a[key] for a, b in pairs) for key in pairs[0][0]}


def flat(stats: Row) -> dict[str, float]:
    """The counters of interest under one name each."""
    found = {f"{cause}_stall_s": s for cause, s in stats["stall_s"].items()}
    for lane, meter in stats["lanes"].items():
        found |= {f"{lane}_busy_s": meter["busy_s"], f"{lane}_bytes": meter["bytes"]}
    return found | {k: stats["counters"][k] for k in ("demand_loads", "forced_evictions")}


def compete(
    commands: dict[str, list[str]], rounds: int, steps: int, limit_s: float = 150.0,
    measure: Callable[[], dict[str, float]] | None = None,
) -> dict[str, Row]:  # fmt: skip
    """Run every contestant for ``rounds`` turns of ``steps`` counted steps; a row of each.

    ``measure``: the disk's rates now; None: bounds keep those that the contestants started with.
    """
    rivals = [Rival(name, command, limit_s) for name, command in commands.items()]
    try:
        for rival in rivals:
            rival.turn(WARM_STEPS, counted=False)
        for _ in range(rounds):
            for rival in random.sample(rivals, len(rivals)):
                rates = measure() if measure is not None and rival.bounded else None
                rival.turn(steps + 1, rates, counted=True)
        return {rival.name: rival.row() for rival in rivals}
    finally:
        for rival in rivals:
            rival.close()
