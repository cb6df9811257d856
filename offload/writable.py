"""Whether a folder can be written in: by trying or, where nothing may change, by looking."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def nearest(place: Path) -> Path:
    """The place itself, or the closest folder above it that exists."""
    return next(p for p in (place, *place.absolute().parents) if p.exists())


def check_writable(place: Path, *, dry: bool = False) -> None:
    """Make the folder and write in it; ``dry``: only look. Raises OSError."""
    if not dry:
        place.mkdir(parents=True, exist_ok=True)
        probe = place / ".writable"
        probe.touch()
        probe.unlink()
        return
    there = nearest(place)
    number = errno.EACCES if there.is_dir() else errno.ENOTDIR
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise OSError(number, os.strerror(number), str(there))
