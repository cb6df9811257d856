"""The output directory of a run: configuration, metrics, checkpoints, exported model."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload.runconfig import InputError, RunConfig
from offload.settings import to_yaml
from offload.writable import check_writable

KEPT_CHECKPOINTS = 2
_STEP_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Where everything of one run lies under ``root``."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def report(self) -> Path:
        """What the last planned step did, as data; ``offload report`` shows it."""
        return self.root / "report.json"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after ``step`` optimizer steps lies."""
        return self.root / "checkpoints" / f"step-{step:06d}"

    def checkpoints(self) -> list[Path]:
        """Every checkpoint, newest first, valid or not."""
        folder = self.root / "checkpoints"
        found = [(m, p) for p in folder.glob("step-*") if (m := _STEP_NAME.fullmatch(p.name))]
        return [path for _, path in sorted(found, key=lambda row: -int(row[0][1]))]

    def forget_old_checkpoints(self) -> None:
        """Delete all but the newest two: one may be damaged by what made the run stop."""
        for path in self.checkpoints()[KEPT_CHECKPOINTS:]:
            shutil.rmtree(path)

    def open(self, *, resume: bool, dry: bool = False) -> None:
        """Make the directory and try to write in it; ``dry``: only look whether that would work.

        Raises InputError if it cannot be written, or holds another run and ``resume`` is false.
        """
        try:
            check_writable(self.root, dry=dry)
        except OSError as error:
            raise InputError(
                f"cannot write in {self.root}: {error.strerror}; choose another --output"
            ) from error
        if not resume and (self.checkpoints() or self.model.exists()):
            raise InputError(
                f"{self.root} already holds a run; continue it with --resume, "
                "or choose another --output"
            )

    def write_config(self, config: RunConfig) -> None:
        """Write the effective configuration, whole or not at all."""
        fresh = self.config.with_suffix(".tmp")
        fresh.write_text(to_yaml(config), encoding="utf-8")
        os.replace(fresh, self.config)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh directory that takes the place of ``target`` when the block ends without error."""
    fresh = target.with_name(target.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    if target.exists():
        shutil.rmtree(target)
    os.replace(fresh, target)
