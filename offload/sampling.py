"""The next token of each row: greedy, or drawn with a generator of the row's own.

A row's numbers depend on the seed and its index alone, not on which rows go beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """``temperature`` 0: the likeliest token. ``top_k`` 0 and ``top_p`` 1: no limit.

    Applied in this order, as transformers does: temperature, top-k, top-p. Raises ValueError.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no limit) or more, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")


def row_seed(seed: int, row: int) -> int:
    """The seed of one row's generator."""
    return int(np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] >> 1)


class Picker:
    """Draws tokens; remembers each row's generator."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._generators: dict[int, torch.Generator] = {}
        self._warpers = _warpers(sampling)

    def pick(self, logits: Tensor, rows: list[int]) -> list[int]:
        """One token for each of ``rows`` from logits [rows, vocabulary]."""
        scores = logits.float()
        if not self._sampling.temperature:
            return list(map(int, scores.argmax(-1).tolist()))
        for warp in self._warpers:
            scores = warp(None, scores)
        shares = torch.softmax(scores, -1)
        return [self._draw(share, row) for share, row in zip(shares, rows, strict=True)]

    def forget(self, row: int) -> None:
        """A row has ended."""
        self._generators.pop(row, None)

    def _draw(self, shares: Tensor, row: int) -> int:
        if row not in self._generators:
            seed = row_seed(self._sampling.seed, row)
            self._generators[row] = torch.Generator(shares.device).manual_seed(seed)
        return int(torch.multinomial(shares, 1, generator=self._generators[row]))


def _warpers(sampling: Sampling) -> list[Any]:
    """Transformers' own, in its order. Each works row by row."""
    from transformers import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    found: list[Any] = []
    if sampling.temperature not in (0.0, 1.0):
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found
