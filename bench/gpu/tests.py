"""Runs one file of tests and says how it went, test by test, also when it is cut in the middle.

On a GPU: the tests marked ``gpu``. Emulated: a few tests of the same promises on the emulated
device, so that this program is run too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu.common import arguments
from gpu.runner import line

ROOT = Path(__file__).parents[2]
EMULATED = "tests/test_frames.py::test_a_frame_is_free_only_when_no_tensor_refers_to_it"


def main() -> None:
    file = sys.argv.pop(1)
    args = arguments()
    chosen = [EMULATED] if args.emulated else ["-m", "gpu", file]
    # Another torch may warn of what is to come: no reason to waste a borrowed machine's time.
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=",
        "-o", "filterwarnings=default", "--import-mode=importlib", "-v", "--tb=short", *chosen,
    ]  # fmt: skip
    counts = {"PASSED": 0, "FAILED": 0, "ERROR": 0, "SKIPPED": 0}
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE) as tests:
        assert tests.stdout is not None
        for said in tests.stdout:
            print(said, end="", file=sys.stderr, flush=True)
            name, _, rest = said.partition(" ")
            outcome = rest.split(" ")[0].strip()
            if "::" in name and outcome in counts:
                counts[outcome] += 1
                if outcome != "PASSED":
                    line({"test": name, "outcome": outcome})
    told = ", ".join(f"{n} {k.lower()}" for k, n in counts.items() if n)
    line({"tests": counts, "says": told or "no tests"})
    if tests.returncode or not counts["PASSED"]:
        raise SystemExit(f"TestError: {told or 'no tests'} in {Path(file).name}")


if __name__ == "__main__":
    main()
