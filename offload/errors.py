"""Errors that name the thing, the numbers and the remedy."""

from __future__ import annotations


class OffloadError(RuntimeError):
    """Anything this package refuses or cannot do; the message says what to change."""


class BudgetError(OffloadError):
    """A budget is too small. ``smallest_bytes`` is the least budget of ``tier`` that works."""

    def __init__(
        self, message: str, *, tier: str, needed_bytes: int, given_bytes: int, smallest_bytes: int
    ) -> None:
        super().__init__(message)
        self.tier = tier
        self.needed_bytes = needed_bytes
        self.given_bytes = given_bytes
        self.smallest_bytes = smallest_bytes


class CoupledOptimizerError(OffloadError):
    """The optimizer mixes parameters, so it cannot be run chunk by chunk."""


class SpillError(OffloadError):
    """The spill files could not be made, written, or read back intact."""


class CheckpointError(OffloadError):
    """A checkpoint is missing, incomplete or damaged."""
