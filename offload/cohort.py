"""Rows that go through the model as one micro-batch: their inputs, and their keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload.calls import Call
from offload.errors import OffloadError

NewCache = Callable[[int], Any]  # a transformers Cache for so many tokens


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a model's forward understands."""

    position_ids: bool
    logits_to_keep: bool

    @classmethod
    def of(cls, model: nn.Module) -> Dialect:
        """Read from its signature."""
        names = inspect.signature(model.forward).parameters
        return cls("position_ids" in names, "logits_to_keep" in names)

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths may share a micro-batch.

        A model that counts positions itself would count the padding before a shorter prompt.
        """
        return self.position_ids


class Cohort:
    """Some rows between prefill and end. Prompts are padded on the left, and the padding masked."""

    def __init__(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], cache: Any, dialect: Dialect
    ) -> None:
        self.rows = list(rows)
        self.cache = cache
        self._dialect = dialect
        longest = max(map(len, prompts))
        blank = [longest - len(prompt) for prompt in prompts]
        padded = [[0] * n + list(prompt) for n, prompt in zip(blank, prompts, strict=True)]
        self._next = torch.tensor(padded)  # [rows, tokens]
        self._mask = torch.tensor([[0] * n + [1] * (longest - n) for n in blank])  # [rows, seen]

    @property
    def call(self) -> Call:
        """What ``forward`` will call the model with, as far as plans differ by it."""
        tokens, seen = self._next.numel(), self._mask.numel()
        return Call("", seen > tokens, tokens, tokens + 2 * seen)

    def forward(self, model: nn.Module) -> Tensor:
        """Logits [rows, vocabulary] after the last token of each row."""
        told: dict[str, Any] = {}
        if self._dialect.position_ids:
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
            told["position_ids"] = positions[:, -self._next.shape[1] :]
        if self._dialect.logits_to_keep:
            told["logits_to_keep"] = 1
        output = model(
            input_ids=self._next, attention_mask=self._mask, past_key_values=self.cache,
            use_cache=True, **told,
        )  # fmt: skip
        logits: Tensor = output.logits
        return logits[:, -1]

    def push(self, tokens: Sequence[int]) -> None:
        """What each row goes on with."""
        self._next = torch.tensor(tokens)[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], -1)

    def keep(self, rows: Sequence[int]) -> None:
        """The others have ended: free their keys and values."""
        if len(rows) == len(self.rows):
            return
        kept = torch.tensor([self.rows.index(row) for row in rows], dtype=torch.long)
        self.rows = list(rows)
        self._next, self._mask = self._next[kept], self._mask[kept]
        if rows:
            self.cache.batch_select_indices(kept)


def dynamic_caches(model: nn.Module) -> NewCache:
    """Makes caches whole in memory. Raises OffloadError where rows cannot leave them."""
    from transformers import DynamicCache

    config: Any = model.config
    if any(DynamicCache(config=config).is_linear):
        raise OffloadError(
            f"{type(model).__name__} keeps a state that is not keys and values: runtime.generate() "
            "cannot take rows out of it; use model.generate()"
        )
    from offload.roomcache import room_cache

    return lambda tokens: room_cache(config, tokens)
