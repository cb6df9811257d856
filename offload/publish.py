"""A directory that appears whole or not at all, and takes the place of an older one at once.

[Note: what a crash leaves]
All is written into a hidden sibling, ``.NAME.partial``; every file and the sibling itself are
made durable before it gets its name. Where NAME exists the two are exchanged in one system call
(renameat2, RENAME_EXCHANGE). Where the file system lacks that, NAME is first renamed to
``.NAME.previous``: a crash between the two renames leaves that, and `existing` finds it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from offload.errors import CheckpointError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV)


def existing(path: Path) -> Path:
    """Where the directory of this name is now: itself, or what a crash left under another name."""
    path = Path(os.path.realpath(path))
    previous = _beside(path, "previous")
    return previous if previous.is_dir() and not path.exists() else path


@contextmanager
def replacing(path: Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A new directory to write into; when the block ends without error it becomes ``path``.

    Files in it must be fsynced by whoever writes them. ``is_ours`` says whether a directory
    that is not empty may be replaced. Raises CheckpointError for what may not be replaced or is
    being saved by another process, OSError for what the system refuses.
    """
    path = Path(os.path.realpath(path))
    _refuse_foreign(path, is_ours)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(path, "partial")
    lock = _start(fresh, path)
    try:
        with suppress(FileNotFoundError):
            if not path.exists():
                os.rename(_beside(path, "previous"), path)
        yield fresh
        os.fsync(lock)
        _put(fresh, path)
        fsync_folder(path.parent)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    shutil.rmtree(fresh, ignore_errors=True)  # after an exchange this is the older one
    shutil.rmtree(_beside(path, "previous"), ignore_errors=True)


def fsync_folder(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _refuse_foreign(path: Path, is_ours: Callable[[Path], bool]) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file: give the name of a directory")
    if any(path.iterdir()) and not is_ours(path):
        raise CheckpointError(
            f"{path} holds other files: nothing is replaced there; choose another directory"
        )


def _start(fresh: Path, path: Path) -> int:
    """Make the sibling, empty and locked; returns the descriptor that holds the lock."""
    fresh.mkdir(exist_ok=True)
    lock = os.open(fresh, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for entry in fresh.iterdir():  # what a crash left
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except BlockingIOError as error:
        os.close(lock)
        raise CheckpointError(f"another process is saving to {path}") from error
    except BaseException:
        os.close(lock)
        raise
    return lock


def _put(fresh: Path, path: Path) -> None:
    """Give a complete directory its name, at once even where the name is taken."""
    if not path.exists():
        os.rename(fresh, path)
    elif not _exchange(fresh, path):
        previous = _beside(path, "previous")
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(path, previous)
        os.rename(fresh, path)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
