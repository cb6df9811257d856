"""Runs files of tests in one process and says how each went, also when it is cut in the middle.

A test that ends the process (a crash, or one that takes too long) is noted, and the tests that are
left go on in a new one. On a GPU: the tests marked ``gpu``. Emulated: a test of the same promises.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.common import arguments
from gpu.runner import ROW, line

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
EMULATED = "tests/test_frames.py::test_a_frame_is_free_only_when_no_tensor_refers_to_it"
TEST_LIMIT_S = 40.0
PROCESSES = 4  # that may end before their tests do


@dataclass
class Seen:
    """What processes have said until now; tests by name, and how each is asked for."""

    collected: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    began: str = ""

    @property
    def left(self) -> list[str]:
        return [asked for test, asked in self.collected.items() if test not in self.outcomes]

    def run(self, chosen: list[str]) -> int:
        """One process; its exit status."""
        # Another torch may warn of what is to come: no reason to waste a borrowed machine's time.
        command = [
            sys.executable, "-m", "gpu.noted", str(TEST_LIMIT_S),
            "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default",
            "--import-mode=importlib", "-v", "--tb=short", *chosen,
        ]  # fmt: skip
        with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as tests:
            assert tests.stdout is not None
            for said in tests.stdout:
                self.note(json.loads(said.removeprefix(ROW)))
        return tests.returncode

    def note(self, row: Row) -> None:
        """Keep a row of the plugin's; pass on what a test has come to."""
        if "collected" in row:
            self.collected = self.collected or row["collected"]
        elif "began" in row:
            self.began = row["began"]
        else:
            self.outcomes[row["test"]] = row["outcome"]
            line(row)

    def all(self, chosen: list[str]) -> None:
        """As many processes as it takes."""
        for _ in range(PROCESSES):
            status = self.run(chosen)
            if not self.left or self.began in self.outcomes or not self.began:
                return  # all done, or pytest itself could not go on
            self.note({"test": self.began, "outcome": "ended the process", "status": status})
            chosen = self.left


def main() -> None:
    files = [a for a in sys.argv[1:] if a.endswith(".py")]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in files]
    args = arguments()
    seen = Seen()
    seen.all([EMULATED] if args.emulated else ["-m", "gpu", *files])
    counts = Counter(seen.outcomes.values()) + Counter({"not run": len(seen.left)})
    told = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "no tests"
    line({"tests": dict(counts), "says": told})
    if not counts["passed"] or set(counts) - {"passed", "skipped"}:
        raise SystemExit(f"TestError: {told}")


if __name__ == "__main__":
    main()
