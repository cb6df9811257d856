"""The output of ``offload generate``: rows as they end, each once, whatever kills the process.

A row is one line, flushed to the disk with the others of its step before the next one. Beside
``FILE`` stands ``FILE.run.json``, which says how the rows were made: who goes on with the file must
make the rest in the same way.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload.settings import InputError, changed


class RowFile:
    """Open for appending, by one process at a time. ``done``: the ids of the rows that are there.

    ``identity``: what must not change between runs that write to one file; ``known``: the ids of
    all rows there will be. Raises InputError where the file is another's, or damaged in its midst;
    a torn last line, of a run that was killed, is cut off.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], known: Iterable[str | int]) -> None:
        self._path = path
        self._about = _about(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; check --output") from error
        try:
            self._lock()
            self.done = self._read(set(known))
            self._check(dict(identity))
        except BaseException:
            self._file.close()
            raise

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """These rows are on the disk when this returns."""
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if data:
            self._file.write(data.encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"another process is writing {self._path}; wait for it, or give another --output"
            ) from error

    @staticmethod
    def look(path: Path, identity: Mapping[str, Any], known: Iterable[str | int]) -> set[str | int]:
        """The ids that opening the file would find, which is left as it is. Raises as opening."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}; check --output") from error
        done, _ = _whole_rows(path, data, set(known))
        if done:
            _check_same(path, identity)
        return done

    def _read(self, known: set[str | int]) -> set[str | int]:
        """The ids that are there, after the torn end was cut off."""
        self._file.seek(0)
        done, whole_bytes = _whole_rows(self._path, self._file.read(), known)
        self._file.truncate(whole_bytes)
        return done

    def _check(self, identity: dict[str, Any]) -> None:
        """Made with the same settings as what is there."""
        if self.done:
            _check_same(self._path, identity)
            return
        fresh = self._about.with_suffix(".tmp")
        fresh.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, self._about)


def _about(path: Path) -> Path:
    return path.with_name(path.name + ".run.json")


def _whole_rows(path: Path, data: bytes, known: set[str | int]) -> tuple[set[str | int], int]:
    """The ids of the whole rows in a file, and how many bytes these take. Raises InputError."""
    lines = data.splitlines(keepends=True)
    done: set[str | int] = set()
    whole_bytes = 0
    for number, line in enumerate(lines, 1):
        name = _id_of(line)
        if name is None and number == len(lines):
            break
        if name is None or name not in known or name in done:
            what = "is no row" if name is None else f"has the id {name!r}, "
            why = "" if name is None else "twice" if name in done else "no prompt's"
            raise InputError(
                f"{path}:{number} {what}{why}: the file is not of these prompts; give another "
                "--output"
            )
        done.add(name)
        whole_bytes += len(line)
    return done, whole_bytes


def _check_same(path: Path, identity: Mapping[str, Any]) -> None:
    """Raises InputError where the rows that are there were made otherwise."""
    try:
        before = json.loads(_about(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} has rows, but {_about(path).name}, which says how they were made, cannot be "
            "read; give another --output"
        ) from error
    if found := changed(before, identity):
        raise InputError(
            f"the rows in {path} were made with {found}; go on with the same, or "
            "give another --output"
        )


def _id_of(line: bytes) -> str | int | None:
    """The id of a whole row; None: it is none."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
        name = found["id"]
        whole = "finish_reason" in found and "text" in found
    except (ValueError, KeyError, TypeError):
        return None
    return name if whole and isinstance(name, str | int) else None
