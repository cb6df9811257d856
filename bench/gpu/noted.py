"""Runs pytest and says of each test when it begins and how it went. Run by tests.py.

A test that takes too long ends the process: the stacks of all threads go to the log, which is
what tells of a hang on a GPU.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from typing import Any

import pytest
from gpu.runner import ROW

WORSE = ("passed", "skipped", "failed")


class Noted:
    """A plugin. It alone speaks on stdout: what pytest and the tests write goes to stderr."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        self._log = os.fdopen(os.dup(2), "w")
        os.dup2(2, 1)
        self._outcome, self._seconds = WORSE[0], 0.0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        rest = {item.nodeid: item.nodeid.partition("::")[2] for item in session.items}
        self._say({"collected": {i.nodeid: f"{i.path}::{rest[i.nodeid]}" for i in session.items}})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._seconds = WORSE[0], 0.0
        self._say({"began": nodeid})
        faulthandler.dump_traceback_later(self._limit_s, exit=True, file=self._log)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._outcome = max(self._outcome, report.outcome, key=WORSE.index)
        self._seconds += report.duration

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        told = {"test": nodeid, "outcome": self._outcome, "seconds": round(self._seconds, 2)}
        self._say(told)

    def _say(self, row: dict[str, Any]) -> None:
        print(ROW + json.dumps(row), file=self._out, flush=True)


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[2:], plugins=[Noted(float(sys.argv[1]))]))
