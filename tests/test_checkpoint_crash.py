"""Whatever interrupts a save, the earlier checkpoint is whole and the run goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import offload
from offload import publish
from offload.config import Tuning
from offload.errors import CheckpointError
from offload.run import Runtime
from offload.tiers.spec import Machine

MACHINE = Machine(1.8e9, 5.5e9, 1.4e9, 1.4e9, 1e10)


def fresh(folder: Path) -> Runtime:
    """A run over 1 MiB of weights and 2 MiB of state, in 600 KiB."""
    model = nn.Sequential(*(nn.Linear(160, 160) for _ in range(10)))
    optimizer = torch.optim.AdamW(model.parameters())
    offload.wrap(
        model, optimizer, host_memory="600KiB", disk=folder,
        tuning=Tuning(chunk_bytes=32768, machine=MACHINE, poison=True),
    )  # fmt: skip
    return offload.runtime(model)


def step(run: Runtime) -> None:
    assert run.optimizer is not None
    torch.autograd.backward(run.model(torch.ones(2, 160)).sum())
    run.optimizer.step()
    run.optimizer.zero_grad()


def mark(run: Runtime, number: int) -> None:
    """Make the weights tell which save they belong to."""
    with torch.no_grad():
        for p in run.model.parameters():
            p.fill_(number)


def marked(run: Runtime, number: int) -> bool:
    return all(bool((p == number).all()) for p in run.model.parameters())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Runtime]:
    """A run that has state."""
    run = fresh(tmp_path / "spill")
    step(run)
    yield run
    run.close()


@pytest.fixture
def point(run: Runtime, tmp_path: Path) -> Path:
    """Its checkpoint number 0."""
    mark(run, 0)
    run.save(tmp_path / "point", extra={"save": 0})
    return tmp_path / "point"


def save(run: Runtime, point: Path, number: int) -> None:
    mark(run, number)
    run.save(point, extra={"save": number})


def load(run: Runtime, point: Path) -> int:
    """Load, check that the weights are those of the checkpoint's number, and return it."""
    number = int(run.load(point)["save"])
    assert marked(run, number)
    return number


SAVER = """
    import os, pkgutil, signal, sys
    from pathlib import Path
    import test_checkpoint_crash as t
    folder, module, name, calls = Path(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
    run = t.fresh(folder / "spill")
    t.step(run)
    t.save(run, folder / "point", 0)
    module = pkgutil.resolve_name(module)
    real = getattr(module, name)
    def dying(*args):
        global calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    setattr(module, name, dying)
    t.save(run, folder / "point", 1)
"""


@pytest.mark.parametrize(
    ("module", "name", "calls", "expected"),
    [
        ("os", "write", 20, 0),  # in the middle of a file
        ("offload.checkpoint", "write_manifest", 1, 0),
        ("offload.publish", "_put", 1, 0),  # all written, not yet in place
        ("offload.publish", "fsync_folder", 1, 1),  # in place, the older one not yet deleted
    ],
)
def test_kill_leaves_a_whole_checkpoint(
    run: Runtime, tmp_path: Path, module: str, name: str, calls: int, expected: int
) -> None:
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAVER), str(tmp_path), module, name, str(calls)],
        check=False, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / ".point.partial").exists()
    assert load(run, tmp_path / "point") == expected
    save(run, tmp_path / "point", 7)  # what the crash left is no hindrance
    assert load(run, tmp_path / "point") == 7
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".point")]


@pytest.mark.parametrize("exchange", [True, False])
def test_every_failing_call_leaves_a_whole_checkpoint(
    run: Runtime, point: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail the first, second, ... system call of a save, until there is none left to fail."""
    if not exchange:
        monkeypatch.setattr(publish, "_exchange", lambda *_: False)
    calls_left, failures, last, attempt = 0, 0, 0, 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls_left
            calls_left -= 1
            if calls_left == -1:
                raise OSError(5, "Input/output error")
            return real(*args, **kwargs)

        return call

    while calls_left <= 0:
        calls_left = attempt
        attempt += 1
        with monkeypatch.context() as patch:
            for name in ("open", "fsync", "rename", "mkdir", "statvfs"):
                patch.setattr(os, name, failing(getattr(os, name)))
            try:
                save(run, point, attempt)
            except CheckpointError:
                failures += 1
        number = load(run, point)
        assert number in (last, attempt)
        last = number
    assert failures > 10
    assert last == attempt
    step(run)


def test_without_exchange_a_crash_between_renames_is_found(
    run: Runtime, point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_exchange", lambda *_: False)
    save(run, point, 1)
    os.rename(point, point.with_name(f".{point.name}.previous"))  # the crash
    mark(run, 5)
    assert load(run, point) == 1
    save(run, point, 2)
    assert load(run, point) == 2
    assert not [p for p in point.parent.iterdir() if p.name.startswith(f".{point.name}")]


def test_two_savers_do_not_mix(run: Runtime, point: Path) -> None:
    with (
        publish.replacing(point, lambda _: True),
        pytest.raises(CheckpointError, match="another process"),
    ):
        save(run, point, 1)


def test_interrupt_leaves_no_trace(
    run: Runtime, point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("offload.checkpoint.write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(run, point, 1)
    assert [p for p in point.parent.iterdir() if p.name.startswith(".point")] == []
    assert load(run, point) == 0
    step(run)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs to mount a tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_full_disk(
    run: Runtime, small_disk: Path, foreseen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = small_disk / "point"
    save(run, point, 1)
    free_bytes = os.statvfs(small_disk).f_bavail * 4096
    (small_disk / "ballast").write_bytes(bytes(free_bytes - (1 << 20)))
    if not foreseen:
        monkeypatch.setattr("offload.checkpoint._check_space", lambda *_: None)
    match = "free, but a checkpoint needs" if foreseen else "could not be written.*free at least"
    with pytest.raises(CheckpointError, match=match):
        save(run, point, 2)
    assert not (small_disk / ".point.partial").exists()
    assert marked(run, 2)
    step(run)
    assert load(run, point) == 1
