"""Ctrl-C that lets the step finish, and a second one that does not."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

_SHOW_CURSOR = b"\x1b[?25h"  # the live panel hides it, and a killed process cannot restore it


class Interrupt:
    """While entered, the first SIGINT or SIGTERM only sets ``signal``; the next one ends us.

    Outside the main thread, where handlers cannot be set, it does nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        for again in self._previous:
            signal.signal(again, signal.SIG_DFL)
        # os.write: print may hold the stream's lock in the code that was interrupted.
        if sys.stderr.isatty():
            os.write(2, _SHOW_CURSOR)
        os.write(2, b"\nfinishing this step and saving; once more to stop at once\n")
