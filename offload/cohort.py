"""Rows that go through the model as one micro-batch: their inputs, and their keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload.cachename import OLD, cache_name
from offload.calls import Call
from offload.errors import OffloadError

NewCache = Callable[[int], Any]  # a transformers Cache for so many tokens


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a model's forward understands. ``start``: what an encoder-decoder's answers begin with,
    None: the model has no encoder.
    """

    position_ids: bool
    logits_to_keep: bool
    start: int | None = None
    cache: str = OLD  # its argument

    @classmethod
    def of(cls, model: Any) -> Dialect:
        """Read from its signature and configuration. Raises OffloadError."""
        names = inspect.signature(model.forward).parameters
        start = start_token(model) if model.config.is_encoder_decoder else None
        cache = cache_name(model.forward)
        return cls("position_ids" in names, "logits_to_keep" in names, start, cache)

    @property
    def pads(self) -> bool:
        """Whether prompts of different lengths may share a micro-batch.

        A model that counts positions itself would count the padding before a shorter prompt; an
        encoder's are padded behind.
        """
        return self.position_ids or self.start is not None

    def fed(self, prompt: Sequence[int]) -> int:
        """Tokens that the decoder is given before it picks the first."""
        return len(prompt) if self.start is None else 1

    def begin(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], cache: Any) -> Cohort:
        """A cohort of these rows."""
        if self.start is None:
            return Cohort(rows, prompts, cache, self)
        return EncodedCohort(rows, prompts, cache, self)


class Cohort:
    """Some rows between prefill and end. Prompts are padded on the left, and the padding masked."""

    def __init__(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], cache: Any, dialect: Dialect
    ) -> None:
        self.rows = list(rows)
        self.cache = cache
        self._dialect = dialect
        self._next, self._mask = padded(prompts, before=True)  # [rows, tokens], [rows, seen]

    @property
    def encodes(self) -> bool:
        """Whether `encode` is to be called before the next `forward`."""
        return False

    def encode(self, model: Any) -> None:
        """There is nothing to encode."""

    @property
    def call(self) -> Call:
        """What ``forward`` will call the model with, as far as plans differ by it."""
        tokens, seen = self._next.numel(), self._mask.numel()
        return Call("", seen > tokens, tokens, tokens + 2 * seen)

    def forward(self, model: nn.Module) -> Tensor:
        """Logits [rows, vocabulary] after the last token of each row."""
        told: dict[str, Any] = {self._dialect.cache: self.cache}
        if self._dialect.position_ids:
            positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
            told["position_ids"] = positions[:, -self._next.shape[1] :]
        if self._dialect.logits_to_keep:
            told["logits_to_keep"] = 1
        output = model(input_ids=self._next, attention_mask=self._mask, use_cache=True, **told)
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
        self._select(kept)

    def _select(self, kept: Tensor) -> None:
        self._next, self._mask = self._next[kept], self._mask[kept]
        if self.rows:
            self.cache.batch_select_indices(kept)


class EncodedCohort(Cohort):
    """Rows of an encoder-decoder model: prompts are encoded once, padded behind and masked.

    Keys and values of what was encoded are made in the first ``forward``, and stay in the cache.
    """

    def __init__(
        self, rows: Sequence[int], prompts: Sequence[Sequence[int]], cache: Any, dialect: Dialect
    ) -> None:
        super().__init__(rows, prompts, cache, dialect)
        self._prompts, self._mask = padded(prompts, before=False)
        assert dialect.start is not None
        self._next = torch.full((len(prompts), 1), dialect.start)
        self._encoded: Tensor | None = None  # [rows, tokens of the longest prompt, width]

    @property
    def encodes(self) -> bool:
        """Before the first ``forward``."""
        return self._encoded is None

    def encode(self, model: Any) -> None:
        """One pass of the encoder."""
        found = model.get_encoder()(input_ids=self._prompts, attention_mask=self._mask)
        self._encoded = found.last_hidden_state

    @property
    def call(self) -> Call:
        """As `Cohort.call`; in the first step the encoder's tokens count."""
        rows = len(self.rows)
        seen = self._mask.numel() + rows * (1 + int(self.cache.get_seq_length()))
        tokens = rows + self._mask.numel() * self.encodes
        return Call("", not self.encodes, tokens, tokens + 2 * seen)

    def forward(self, model: Any) -> Tensor:
        """Logits [rows, vocabulary] after the last token of each row."""
        from transformers.modeling_outputs import BaseModelOutput

        output = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=self._encoded),
            attention_mask=self._mask, decoder_input_ids=self._next, use_cache=True,
            **{self._dialect.cache: self.cache},
        )  # fmt: skip
        logits: Tensor = output.logits
        return logits[:, -1]

    def push(self, tokens: Sequence[int]) -> None:
        """What each row goes on with."""
        self._next = torch.tensor(tokens)[:, None]

    def _select(self, kept: Tensor) -> None:
        super()._select(kept)
        assert self._encoded is not None
        self._encoded = self._encoded[kept]


def padded(prompts: Sequence[Sequence[int]], *, before: bool) -> tuple[Tensor, Tensor]:
    """Prompts of one length, [rows, tokens], and which of the tokens are theirs."""
    longest = max(map(len, prompts))
    tokens, mask = [], []
    for prompt in prompts:
        blank, own = [0] * (longest - len(prompt)), [1] * len(prompt)
        tokens.append([*blank, *prompt] if before else [*prompt, *blank])
        mask.append([*blank, *own] if before else [*own, *blank])
    return torch.tensor(tokens), torch.tensor(mask)


def start_token(model: Any) -> int:
    """What an encoder-decoder's answers begin with. Raises OffloadError where it is not said."""
    if model.main_input_name != "input_ids":
        raise OffloadError(
            f"{type(model).__name__} does not read tokens but {model.main_input_name}: "
            "runtime.generate() is for models of text; use model.generate()"
        )
    told = model.generation_config
    for start in (told.decoder_start_token_id, told.bos_token_id):
        if isinstance(start, int):
            return start
    raise OffloadError(
        f"{type(model).__name__} has an encoder, but its generation_config has no "
        "decoder_start_token_id, which its answers begin with; set it"
    )


def dynamic_caches(model: nn.Module) -> NewCache:
    """Makes caches whole in memory. Raises OffloadError where rows cannot leave them."""
    from transformers import DynamicCache, EncoderDecoderCache

    config: Any = model.config
    if any(DynamicCache(config=config).is_linear):
        raise OffloadError(
            f"{type(model).__name__} keeps a state that is not keys and values: runtime.generate() "
            "cannot take rows out of it; use model.generate()"
        )
    from offload.roomcache import room_cache

    if config.is_encoder_decoder:
        return lambda tokens: EncoderDecoderCache(
            room_cache(config, tokens), DynamicCache(config=config)
        )
    return lambda tokens: room_cache(config, tokens)
