"""Keys and values of a cohort, whole in memory, each written once.

transformers' own cache copies all it has for every token: twice the traffic of attention itself, in
memory that malloc gives out and takes back. How many tokens a cohort will have is known when it
begins, so there is room for all of them; attention is given views, and computes the same bits.

Imported only where a cache is asked for: transformers is heavy.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's cache with room for ``tokens``; for more it moves.

    ``keys`` and ``values`` [batch, heads, tokens, dim] are the beginnings of their rooms, unless
    something else of transformers' has put others in their place: then the next ``update`` moves.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        self._rooms: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Add states [batch, heads, new, dim]; returns views of those of all tokens, new last."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._joined("keys", self.keys, key_states)
        self.values = self._joined("values", self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows; the memory of all is free at once."""
        super().batch_select_indices(indices)
        self._rooms.clear()

    def _joined(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        begin = held.shape[-2] if held.numel() else 0  # transformers begins with an empty vector
        batch, heads, count, dim = new.shape
        room = self._rooms.get(name)
        if room is None or room.shape[2] < begin + count or not _begins(held, room):
            room = new.new_empty(batch, heads, max(begin + count, self._tokens), dim)
            if begin:
                room[:, :, :begin] = held
            self._rooms[name] = room
        room[:, :, begin : begin + count] = new
        return room[:, :, : begin + count]


def _begins(held: Tensor, room: Tensor) -> bool:
    """Whether these keys or values are the first ones of this room."""
    return held.data_ptr() == room.data_ptr() and held.shape[:2] == room.shape[:2]


def room_cache(config: Any, tokens: int) -> Any:
    """``past_key_values`` for rows of at most so many tokens, by what is known when they begin.

    Layers with sliding windows are transformers' own: they are bounded.
    """
    cache: Any = DynamicCache(config=config)
    cache.layers = [
        RoomyLayer(tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
