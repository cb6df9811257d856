"""When a row of generated tokens ends, and what its text is then. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

STOP_MARGIN = 16  # tokens more than a stop string has characters, in which it is looked for


@dataclass(frozen=True, slots=True)
class Ending:
    """``new_tokens``: at most. ``positions``: of the model, None: it does not say. Stop strings
    are looked for in what ``decode`` makes of a row's new tokens. Raises ValueError.
    """

    new_tokens: int
    eos: frozenset[int] = frozenset()
    positions: int | None = None
    stop: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None

    def __post_init__(self) -> None:
        if self.stop and self.decode is None:
            raise ValueError("stop strings need a tokenizer, to read what was generated")

    def reason(self, prompt_tokens: int, tokens: Sequence[int]) -> str | None:
        """Why a row with these new tokens ends now: "eos", "stop", "length"; None: it goes on.

        At the model's last position a row ends by its length, whatever was asked for.
        """
        if tokens[-1] in self.eos:
            return "eos"
        if self.stop and self._stops(tokens):
            return "stop"
        left = self.positions - prompt_tokens if self.positions is not None else self.new_tokens
        return "length" if len(tokens) >= min(self.new_tokens, left) else None

    def text(self, tokens: Sequence[int], reason: str) -> str | None:
        """What was written, without the end token, up to a stop string; None: nobody can read."""
        if self.decode is None:
            return None
        text = self.decode(tokens[:-1] if reason == "eos" else tokens)
        cuts = [at for at in map(text.find, self.stop) if at >= 0]
        return text[: min(cuts, default=len(text))]

    def _stops(self, tokens: Sequence[int]) -> bool:
        assert self.decode is not None
        tail = tokens[-(max(map(len, self.stop)) + STOP_MARGIN) :]
        # A tail may read otherwise than it does within the whole.
        return all(self._within(self.decode(part)) for part in (tail, tokens))

    def _within(self, text: str) -> bool:
        return any(stop in text for stop in self.stop)
