"""Whether code of the user's may have written to a chunk since it came: see calls.py's note."""

from __future__ import annotations

from collections.abc import Callable

from offload.prefetch.trace import Phase


class Trust:
    """Of one engine. ``hooks``: whether code of the user's may run within a backward pass.

    ``alone``: tells whether a forward pass is under way in which none of it runs.
    """

    def __init__(self) -> None:
        self.hooks = True
        self.alone: Callable[[], bool] = lambda: False
        self.phase = Phase.FORWARD  # of the present moment
        self._came_alone: set[int] = set()  # chunks, in the pass that runs
        self._ordered_alone: set[int] = set()

    def ordered(self, chunk: int) -> None:
        """The chunk is being read from now on."""
        if self.alone():
            self._ordered_alone.add(chunk)
        else:
            self._ordered_alone.discard(chunk)

    def came(self, chunk: int) -> None:
        """The chunk is in memory from now on."""
        if self.alone():
            self._came_alone.add(chunk)

    def unseen(self, chunk: int) -> bool:
        """Whether nobody can have written to it while it was read."""
        return self.phase.updates or (chunk in self._ordered_alone and self.alone())

    def untouched(self, chunk: int) -> bool:
        """Whether nobody can have written to it since it came; False: it has to be compared."""
        return chunk in self._came_alone and self.alone()

    @property
    def quiet(self) -> bool:
        """Whether nobody writes to a chunk while the engine does."""
        return self.phase.updates or (self.phase is Phase.BACKWARD and not self.hooks)

    def forget(self) -> None:
        """Code of the user's ran or will run: all that is in memory has to be compared."""
        self._came_alone.clear()
        self._ordered_alone.clear()
