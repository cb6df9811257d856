"""Which change of a job would help most for least: a ranking of forecasts of variants. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

WORTH = 0.03  # of tokens a second, that a change must bring to be named
WORTH_WEAR = 0.1  # of the bytes written, where it brings no speed


class Cost(IntEnum):
    """What a change costs, the cheapest first."""

    NONE = 0  # the same numbers
    NUMBERS = 1  # other numbers: narrower state or weights, another batch
    HARDWARE = 2  # memory that has to be bought


@dataclass(frozen=True, slots=True)
class Outcome:
    """A forecast in short. ``tokens_per_s`` 0 where it does not fit."""

    fits: bool
    tokens_per_s: float
    written_bytes_a_token: float


@dataclass(frozen=True, slots=True)
class Change:
    """One variant: what would be changed, and the forecast of it."""

    what: str
    cost: Cost
    then: Outcome

    def gain(self, now: Outcome) -> float:
        """Times the tokens a second; infinite where only the variant fits."""
        if not self.then.fits:
            return 0.0
        return self.then.tokens_per_s / now.tokens_per_s if now.fits else float("inf")


def rank(now: Outcome, changes: Iterable[Change]) -> list[Change]:
    """The changes that help, cheapest first, and of one cost the fastest first.

    Where the job does not fit, those help with which it does; where it does, those that bring more
    tokens a second, or as many while clearly less is written to the disk.
    """
    found = [c for c in changes if c.then.fits and (not now.fits or _helps(c, now))]
    return sorted(found, key=lambda c: (c.cost, -c.then.tokens_per_s))


def _helps(change: Change, now: Outcome) -> bool:
    gain = change.gain(now)
    wear = now.written_bytes_a_token
    spared = wear > 0 and change.then.written_bytes_a_token < (1 - WORTH_WEAR) * wear
    return gain > 1 + WORTH or (spared and gain > 1 - WORTH)
