"""The KV cache as ``transformers`` sees it: ``runtime.kv_cache()`` for ``model.generate``.

Imported only where a cache is asked for: transformers is heavy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
)

from offload.errors import OffloadError
from offload.history import Errors, History, Shape
from offload.kivi import BITS, GROUP, Kivi, SquaredError
from offload.kvopen import check_attention
from offload.kvstore import KVStore
from offload.kvwhere import Attends, Whereabouts
from offload.prefetch.cache import choose_block_tokens

Making = Callable[[Tensor, Tensor], History]


class ManagedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's cache over a `History`, which is made when its shapes are seen."""

    is_sliding = False
    is_croppable = True

    def __init__(  # the base class would set `keys` and `values`
        self, make: Making, where: Whereabouts | None, attention: str
    ) -> None:
        self.history: History | None = None
        self.device = torch.device("cpu")
        self._make = make
        self._where = where  # None: where keys and values lie, attention is computed
        self._attends = Attends(attention)

    @property
    def is_initialized(self) -> bool:
        return self.history is not None

    @property
    def keys(self) -> Tensor | None:
        """[batch, heads, tokens, dim]: fetched, and right, as long as it is held."""
        return self._read(0)

    @property
    def values(self) -> Tensor | None:
        """As ``keys``."""
        return self._read(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.history = self._make(key_states, value_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Add states [batch, heads, new, dim]; returns those of all tokens, new ones last."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise OffloadError(
                "a managed KV cache holds no history for the backward pass: call the model under "
                "torch.no_grad(), or without past_key_values"
            )
        if self.history is None:
            self.lazy_initialization(key_states, value_states)
        assert self.history is not None
        with torch.no_grad():
            if self._where is None:
                return self.history.append(key_states, value_states)
            return self._where.append(self._attends, self.history, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.history.tokens if self.history is not None else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Residency is the store's business."""

    def prefetch(self) -> None:
        """As ``offload``."""

    def reset(self) -> None:
        """Forget everything."""
        if self.history is not None:
            self.history.close()
            self.history = None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a negative number of them, as transformers wants it."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop() takes a negative number of tokens, not {tokens_to_remove}")
        if self.history is not None and tokens_to_remove:
            self.history.crop(max(self.history.tokens + tokens_to_remove, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times; nothing is copied but the block that is being filled."""
        if self.history is not None:
            rows = torch.arange(self.history.shape.keys.batch)
            self.history.select_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows; what finished blocks hold of others is freed with the cache."""
        if self.history is not None:
            indices = indices.cpu()  # histories are on the host, wherever the model computes
            indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            self.history.select_rows(indices)

    def _read(self, which: int) -> Tensor | None:
        if self.history is None:
            return None
        return self.history.read(self._where.table if self._where is not None else None)[which]


class ManagedCache(DynamicCache):  # type: ignore[misc]
    """``past_key_values`` within the run's budgets; made by ``runtime.kv_cache()``.

    Layers with full attention are managed. Others (sliding windows, linear attention) are
    transformers' own, bounded in size: the windows are debited, not moved; recurrent states are
    neither. Not for training, ``torch.compile`` or copies.
    """

    def __init__(
        self, config: Any, store: KVStore, make: Callable[[Errors], Making],
        attention: str = "auto",
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        self._store = store
        self._errors = Errors(SquaredError(), SquaredError())
        making = make(self._errors)
        theirs: list[Any] = self.layers
        self._foreign_bytes = [0] * len(theirs)
        where = cast("Whereabouts | None", store.beyond)
        self.layers: list[Any] = [
            ManagedLayer(making, where, attention) if type(layer) is DynamicLayer else layer
            for layer in theirs
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `ManagedLayer.update`."""
        layer = self.layers[layer_idx]
        result: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
        if not isinstance(layer, ManagedLayer):
            held = getattr(layer, "keys", None), getattr(layer, "values", None)
            self._debit(layer_idx, sum(x.untyped_storage().nbytes() for x in held if x is not None))
        return result

    def stats(self) -> dict[str, Any]:
        """``runtime.stats()["kv"]``, of all caches, and the error of coding, of this one.

        ``key_error``, ``value_error``: mean squared error over mean square of all coded blocks;
        None where nothing is coded.
        """
        return {
            **self._store.stats(),
            "key_error": self._errors.keys.relative,
            "value_error": self._errors.values.relative,
        }

    def reset(self) -> None:
        """Forget everything; the cache may be used again."""
        super().reset()
        for i in range(len(self.layers)):
            self._debit(i, 0)

    def close(self) -> None:
        """Give back memory and room in the file. The cache may be used again, from the start."""
        self.reset()

    def __deepcopy__(self, memo: object) -> ManagedCache:
        raise OffloadError("a managed KV cache cannot be copied: make another, and run the prompt")

    def _debit(self, layer: int, size_bytes: int) -> None:
        self._store.room.debit(size_bytes - self._foreign_bytes[layer])
        self._foreign_bytes[layer] = size_bytes


class ManagedPair(EncoderDecoderCache):  # type: ignore[misc]
    """For an encoder-decoder: one cache for its own tokens, one for the encoder's."""

    def stats(self) -> dict[str, Any]:
        """See `ManagedCache.stats`; errors are those of its own tokens."""
        told: dict[str, Any] = self.self_attention_cache.stats()
        return told

    def close(self) -> None:
        """Of both."""
        self.reset()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What ``runtime.kv_cache`` was asked for."""

    kv_dtype: str | None = None
    block_tokens: int | None = None
    caches: int = 1
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.kv_dtype not in (None, *BITS):
            raise OffloadError(f"kv_dtype is one of {', '.join(BITS)} or None: {self.kv_dtype!r}")
        if self.block_tokens is not None and self.block_tokens < 1:
            raise OffloadError(f"block_tokens is at least 1, not {self.block_tokens}")
        check_attention(self.attention)


def new_cache(config: Any, store: KVStore, wanted: Wanted) -> Any:
    """A cache for a model with this configuration; a pair of them for an encoder-decoder."""
    if not config.is_encoder_decoder:
        return ManagedCache(config, store, _making(config, store, wanted, 1), wanted.attention)
    return ManagedPair(
        *(ManagedCache(config, store, _making(config, store, wanted, 2), wanted.attention)
          for _ in range(2))
    )  # fmt: skip


def _making(
    config: Any, store: KVStore, wanted: Wanted, of_each: int
) -> Callable[[Errors], Making]:
    codec = Kivi(BITS[wanted.kv_dtype]) if wanted.kv_dtype is not None else None
    layers = config.get_text_config(decoder=True).num_hidden_layers
    lines = layers * wanted.caches * of_each

    def with_errors(errors: Errors) -> Making:
        def make(keys: Tensor, values: Tensor) -> History:
            shape = Shape.of(keys, values)
            tokens = wanted.block_tokens or choose_block_tokens(
                shape.size_bytes(GROUP) // GROUP, lines, store.room.limit_bytes,
                1 if codec is None else GROUP,
            )  # fmt: skip
            return History(store, shape, tokens, codec, errors)

        return make

    return with_errors
