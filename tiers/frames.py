"""Frames: huge-page buffers that hold one chunk each, reused so that pages are zeroed once.

A new frame is not touched here: its pages appear where it is first written, which for a read
is inside the lane's worker.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from offload.tiers import vm

POISON_BYTE = 0xFF  # NaN in every float dtype


@dataclass(frozen=True, slots=True)
class Frame:
    """One buffer. Its pages are at ``address``, or on loan at a chunk's home."""

    address: int
    size_bytes: int


class FramePool:
    """Owns all frames of the host tier; ``total_bytes`` is what they really hold.

    ``poison``: fill every frame that comes back, so that a late reader sees NaN (for tests).
    ``seen`` is told, while somebody records, whose frame came or went: chunk (-1: nobody's, it was
    freed) and bytes.
    """

    def __init__(self, *, poison: bool = False) -> None:
        self.total_bytes = 0
        self.idle_bytes = 0
        self.poison = poison
        self.seen: Callable[[int, int], None] | None = None
        self._idle: defaultdict[int, list[Frame]] = defaultdict(list)

    def has_idle(self, size_bytes: int) -> bool:
        """Whether a frame of exactly this size is idle."""
        return bool(self._idle[size_bytes])

    def take(self, size_bytes: int) -> Frame:
        """An idle frame of exactly this size, or a new one."""
        idle = self._idle[size_bytes]
        if idle:
            self.idle_bytes -= size_bytes
            # Oldest first: frames rotate, so that a stale address is never right by chance.
            return idle.pop(0)
        address = vm.reserve(size_bytes)
        vm.want_huge(address, size_bytes)
        self.total_bytes += size_bytes
        return Frame(address, size_bytes)

    def give(self, frame: Frame) -> None:
        """Take back a frame whose pages are at its own address."""
        if self.poison:
            vm.fill(frame.address, frame.size_bytes, POISON_BYTE)
        self._idle[frame.size_bytes].append(frame)
        self.idle_bytes += frame.size_bytes

    def trim(self, keep_bytes: int = 0, *, sparing: int = 0) -> None:
        """Free idle frames until at most ``keep_bytes`` are idle, size ``sparing`` last."""
        for size in sorted(self._idle, key=lambda s: s == sparing):
            while self._idle[size] and self.idle_bytes > keep_bytes:
                self._free(self._idle[size].pop())

    def _free(self, frame: Frame) -> None:
        vm.release(frame.address, frame.size_bytes)
        self._freed(frame)

    def _freed(self, frame: Frame) -> None:
        self.idle_bytes -= frame.size_bytes
        self.total_bytes -= frame.size_bytes
        if self.seen is not None:
            self.seen(-1, -frame.size_bytes)
