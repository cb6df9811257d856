"""The host tier's one byte account: nothing takes memory that was not debited here first."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

from offload.heap import FREE_KEPT_BYTES, Heap
from offload.tiers.frames import FramePool


class Other(StrEnum):
    """What memory that is not chunks is for."""

    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"  # on their way home
    KV = "kv"
    STAGING = "staging"


class Ledger:
    """Chunks' frames, fixed regions, and what is not chunks, against one budget in bytes.

    ``kept_bytes``: of freed memory malloc may keep so much; what is too much to pass over in
    silence counts as fixed. ``seen`` is told of other memory that comes and goes, while somebody
    records.
    """

    def __init__(
        self, budget_bytes: int, pool: FramePool, fixed_bytes: int = 0,
        kept_bytes: int = FREE_KEPT_BYTES,
    ) -> None:  # fmt: skip
        self.budget_bytes = budget_bytes
        self.fixed_bytes = fixed_bytes + kept_bytes - FREE_KEPT_BYTES
        self.other_bytes = 0
        self.other_by_kind = dict.fromkeys(Other, 0)
        self.held_bytes = 0  # foreseen, not debited yet
        self.peak_bytes = 0
        self.peak_other_bytes = 0
        self._pool = pool
        self.heap = Heap(lambda: self.used_bytes, kept_bytes)
        self.seen: Callable[[Other, int], None] | None = None

    @property
    def used_bytes(self) -> int:
        """What is held now, idle frames included."""
        return self._pool.total_bytes + self.fixed_bytes + self.other_bytes

    @property
    def idle_bytes(self) -> int:
        """Of that, frames that hold nothing."""
        return self._pool.idle_bytes

    @property
    def room_bytes(self) -> int:
        """What could still be taken: idle frames are reused or freed."""
        return self.budget_bytes - self.used_bytes + self._pool.idle_bytes

    @property
    def capacity_bytes(self) -> int:
        """What chunks and other memory may take together."""
        return self.budget_bytes - self.fixed_bytes

    def prepare_frame(self, size_bytes: int, *, idle: bool) -> None:
        """Make sure that taking a frame of this size keeps within the budget."""
        if not idle:
            self._settle(size_bytes)
            self._trim(size_bytes, sparing=size_bytes)

    def hold(self, size_bytes: int) -> None:
        """Free idle frames so that this much can appear before it is debited.

        It appears through malloc, which takes it from what it kept.
        """
        self._settle(0)
        self._trim(size_bytes)
        self.held_bytes = size_bytes

    def take_other(self, size_bytes: int, kind: Other = Other.ACTIVATIONS) -> None:
        """Debit memory that is not chunks, most often there already. There must be room."""
        self._settle(0)
        self._trim(size_bytes)
        self._change(size_bytes, kind)
        self.held_bytes = max(self.held_bytes - size_bytes, 0)
        self.peak_other_bytes = max(self.peak_other_bytes, self.other_bytes)
        self.see()

    def take_fixed(self, size_bytes: int) -> None:
        """Debit (below 0: credit) what comes for good. There must be room."""
        self._trim(size_bytes)
        self.fixed_bytes += size_bytes
        if size_bytes > 0:
            self.see()

    def give_other(self, size_bytes: int, kind: Other = Other.ACTIVATIONS) -> None:
        """Credit it back; the system gets it too before other memory is taken."""
        self._change(-size_bytes, kind)
        self.heap.freed(size_bytes)

    def passed(self, size_bytes: int) -> None:
        """Up to so much of what is debited was malloc's for a while, and is free again."""
        self.heap.freed(size_bytes)
        self._settle(0)

    def see(self) -> None:
        """Note the present use for the peak."""
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def _change(self, size_bytes: int, kind: Other) -> None:
        self.other_bytes += size_bytes
        self.other_by_kind[kind] += size_bytes
        if self.seen is not None:
            self.seen(kind, size_bytes)

    def _settle(self, size_bytes: int) -> None:
        self.heap.settle(self.budget_bytes - self.used_bytes - size_bytes)

    def _trim(self, size_bytes: int, sparing: int = 0) -> None:
        over_bytes = self.used_bytes + size_bytes - self.budget_bytes
        if over_bytes > 0:
            self._pool.trim(max(self._pool.idle_bytes - over_bytes, 0), sparing=sparing)
