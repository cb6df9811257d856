"""How long a run will still take, told from its steady steps. Pure: no clock, no I/O.

The first steps of a run are recorded: on demand, under watch, often twice as long as those after
them. They count only until there is another. Medians, so that one slow step changes nothing.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

WINDOW = 20  # steps that are looked back on


@dataclass(frozen=True, slots=True)
class Left:
    """``seconds`` are left; ``steady``: told from steps like those to come, not the first ones."""

    seconds: float
    steady: bool

    def __str__(self) -> str:
        return duration(self.seconds) if self.steady else f"under {duration(self.seconds)}"


def duration(seconds: float) -> str:
    """``75`` -> ``1:15``; hours only when there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Steady:
    """Recent seconds of steady steps; of all steps while there is no steady one."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float, *, steady: bool) -> None:
        """A step, or a share of one, took so long."""
        if steady:
            self._recent.append(seconds)
        else:
            self._first.append(seconds)

    @property
    def known(self) -> bool:
        """Whether a steady one was seen."""
        return bool(self._recent)

    @property
    def median_s(self) -> float:
        """0 before the first."""
        return statistics.median(self._recent or self._first or [0.0])


class StepsLeft:
    """Of training: steps, and what evaluations and checkpoints between them take on average."""

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self._steps = Steady()
        self._between_s = 0.0
        self._seen = 0
        self._previous_s: float | None = None

    def after(self, step: int, step_s: float, now_s: float, *, steady: bool) -> Left:
        """Step ``step``, of ``step_s``, and what follows it were over at ``now_s``."""
        self._steps.add(step_s, steady=steady)
        if self._previous_s is not None:
            self._seen += 1
            self._between_s += max(now_s - self._previous_s - step_s, 0.0)
        self._previous_s = now_s
        each_s = self._steps.median_s + self._between_s / max(self._seen, 1)
        return Left(each_s * (self.last_step - step), self._steps.known)


class RowsLeft:
    """Of generation: tokens still to come, and prompts that have not begun.

    ``tokens``: the most that a row may get; ``rows`` and ``prompt_tokens``: of all rows to make.
    """

    def __init__(self, rows: int, prompt_tokens: int, tokens: int) -> None:
        self._rows = rows
        self._prompt_tokens = prompt_tokens
        self._most = tokens
        self._decode = Steady()  # seconds of a token
        self._prefill = Steady()  # of a prompt's token, beside the new ones
        self._steps = [0, 0]  # of decoding alone, with prompts
        self._ended = [0, 0]  # rows, and their tokens
        self._begun_tokens = 0  # of rows that have not ended

    def after(self, step_s: float, new: int, prompt: int, ended: list[int]) -> Left:
        """A step with ``new`` tokens and ``prompt`` tokens of prompts; ``ended``: rows' lengths."""
        self._prompt_tokens -= prompt
        self._ended[0] += len(ended)
        self._ended[1] += sum(ended)
        self._begun_tokens += new - sum(ended)
        # The first of each kind is recorded.
        with_prompts = prompt > 0
        steady = self._steps[with_prompts] > 0
        self._steps[with_prompts] += 1
        if with_prompts:
            beside_s = self._decode.median_s * new if self._decode.known else 0.0
            self._prefill.add(max(step_s - beside_s, 0.0) / prompt, steady=steady)
        else:
            self._decode.add(step_s / new, steady=steady)
        return Left(self._seconds(step_s / new), self._steady())

    def _seconds(self, token_s: float) -> float:
        """Before a step without prompts was seen, ``token_s`` is all that is known."""
        each_s = self._decode.median_s or token_s
        return each_s * self._tokens() + self._prefill.median_s * self._prompt_tokens

    def _steady(self) -> bool:
        return self._decode.known and (self._prefill.known or not self._prompt_tokens)

    def _tokens(self) -> float:
        """Rows become as long as those that have ended; before one has, as long as allowed."""
        rows, tokens = self._ended
        length = tokens / rows if rows else self._most
        return max(length * (self._rows - rows) - self._begun_tokens, 0.0)
