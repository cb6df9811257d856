"""``offload`` commands in forks of one process that has imported everything, ended by signals.

``python -m tests.forked FILE``: FILE holds a list of `Scenario` as JSON; the exit status of each
(negative: the signal that killed it) is printed as a JSON list.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# A busy machine; nothing waits so long that comes at all.
PATIENCE_S = float(os.environ.get("OFFLOAD_TEST_PATIENCE_S", "240"))
LONG_S = 3600.0


@dataclass(frozen=True)
class Scenario:
    """A command, and when it gets the first signal: once its output holds ``when``.

    ``twice``: its second step takes very long, and it gets another while that runs.
    """

    arguments: list[str]
    when: str
    number: int
    folder: str
    twice: bool = False

    @property
    def out(self) -> Path:
        """What it writes."""
        return Path(self.folder) / "stdout"

    @property
    def err(self) -> Path:
        """Its warnings and errors."""
        return Path(self.folder) / "stderr"


def run(scenario: Scenario) -> int:
    """Its exit status."""
    pid = os.fork()
    if pid == 0:
        _command(scenario)
    try:
        _wait_for(scenario.out, scenario.when)
        os.kill(pid, scenario.number)
        if scenario.twice:
            _wait_for(scenario.err, "finishing this step")
            os.kill(pid, scenario.number)
        return _status_of(pid)
    except BaseException:  # nothing that was started outlives us
        os.kill(pid, signal.SIGKILL)
        raise


def _status_of(pid: int) -> int:
    """When it has ended. Raises TimeoutError where it does not."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    raise TimeoutError("it goes on, in spite of the signal")


def _wait_for(path: Path, text: str) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not path.exists() or text not in path.read_text():
        if time.monotonic() > end_s:
            raise TimeoutError(f"{text!r} never came in {path}")
        time.sleep(0.01)


def _command(scenario: Scenario) -> NoReturn:
    for number, path in ((1, scenario.out), (2, scenario.err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    status: Any = 70
    try:
        from offload.cli import main

        if scenario.twice:
            _make_second_step_long()
        sys.argv = ["offload", *scenario.arguments]
        main()
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.stdout.flush()
        os._exit(int(status))


def _make_second_step_long() -> None:
    from offload import finetune
    from offload.block import Block

    calls = []

    def slow(work: Any) -> Any:
        def step(*arguments: Any) -> Any:
            calls.append(work)
            if len(calls) == 2:
                print("the long step", flush=True)
                time.sleep(LONG_S)  # a signal whose handler returns does not end it
            return work(*arguments)

        return step

    finetune._step = slow(finetune._step)
    setattr(Block, "_forward", slow(Block._forward))  # noqa: B010 (a method is not assigned to)


if __name__ == "__main__":
    import torch

    import offload.batchjob
    import offload.finetune  # noqa: F401

    torch.set_num_threads(1)  # tiny models: a second thread only costs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever our parent ignores
    told = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([run(Scenario(**one)) for one in told]))
