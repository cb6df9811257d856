"""Who has memory of a tier besides its chunks: swapped activations, keys and values."""

from __future__ import annotations

from collections.abc import Callable

Relief = Callable[[bool], bool]


class Tenants:
    """Asks them for room, in the order in which they came.

    A relief gives something back, or ends a write that can be awaited, and says whether it did;
    when told True also what was read ahead.
    """

    def __init__(self) -> None:
        self.kv_disk_bytes: Callable[[], int] = lambda: 0  # of keys and values in their file
        self._reliefs: list[Relief] = []

    def join(self, relief: Relief) -> None:
        """From now on this one is asked, too."""
        self._reliefs.append(relief)

    def leave(self, relief: Relief) -> None:
        """It has nothing any more."""
        self._reliefs.remove(relief)

    def relieve(self, desperate: bool) -> bool:
        """Ask until one has given something; False: there is nothing left."""
        return any(relief(desperate) for relief in self._reliefs)
