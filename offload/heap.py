"""What malloc keeps of freed memory: measured, and given back before it breaks the budget.

glibc keeps the pages of freed activations and gradients for later. Most often later comes at once:
the next gradient has the size of the last. Giving pages back costs milliseconds, and faulting them
in again costs more, so it is done only where the process is seen to hold more than its account.
97.5 M parameters in 400 MiB, updated in the backward pass: 0.90 s a step where 16 MiB may be kept,
0.81 s with 32 MiB, 0.78 s with 48 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from offload.spare import free_memory_bytes
from offload.tiers import vm
from offload.tiers.spec import MIB

FREE_KEPT_BYTES = 16 * MIB  # of freed memory that malloc may keep and no budget accounts for
MOST_KEPT_BYTES = 64 * MIB
BLIND_LOOKS = 64  # after so many the baseline, which other code moves too, is taken anew


def kept_bytes_for(budget_bytes: int) -> int:
    """What malloc may keep under a budget; beyond FREE_KEPT_BYTES it is to be accounted for."""
    return min(max(budget_bytes // 12, FREE_KEPT_BYTES), MOST_KEPT_BYTES)


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process: resident less file-backed and shared pages."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * vm.PAGE_BYTES


class Heap:
    """Knows an upper limit of what malloc keeps, and measures where that might be too much.

    ``accounted``: the bytes that a ledger knows of. ``kept_bytes`` may always be kept, and more
    while the budget has room for it. ``extra_bytes`` may be kept beyond all that.
    """

    def __init__(
        self,
        accounted: Callable[[], int],
        kept_bytes: int = FREE_KEPT_BYTES,
        spare: Callable[[], int] = free_memory_bytes,
    ) -> None:
        self.kept_bytes = kept_bytes
        self.extra_bytes = 0
        self.trims = 0
        self._accounted = accounted
        self._spare = spare
        self._baseline = 0  # what the process held beyond its account when nothing was kept
        self._measured_bytes = 0  # kept, when last looked at
        self._freed_bytes = 0  # since then
        self._looks = BLIND_LOOKS

    def keep(self, slack_bytes: int) -> None:
        """From now on so much may be kept besides, or a sixteenth of what the system has left.

        Asked once a step: to read what cgroups leave takes a millisecond.
        """
        self.extra_bytes = min(slack_bytes, self._spare() // 16)

    def freed(self, size_bytes: int) -> None:
        """So much was given back to malloc, or will have been before ``settle``."""
        self._freed_bytes += size_bytes

    def settle(self, room_bytes: int) -> None:
        """Before memory is taken elsewhere, of which ``room_bytes`` will then be left."""
        if self._measured_bytes + self._freed_bytes < self._allowed_bytes(room_bytes):
            return
        self._look()
        self._looks += 1
        allowed_bytes = self._allowed_bytes(room_bytes)
        if self._measured_bytes >= allowed_bytes or self._looks >= BLIND_LOOKS:
            vm.return_freed_memory()
            self._baseline = anonymous_bytes() - self._accounted()
            self._measured_bytes = self._looks = 0
            self.trims += 1

    def _allowed_bytes(self, room_bytes: int) -> int:
        return max(self.kept_bytes, room_bytes + self.extra_bytes)

    def _look(self) -> None:
        self._measured_bytes = anonymous_bytes() - self._accounted() - self._baseline
        self._freed_bytes = 0
