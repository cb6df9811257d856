"""Keys and values with room for what comes: transformers' own, told by every operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offload.roomcache import RoomyLayer, room_cache


def states(generator: torch.Generator, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys of 3 heads x 8, values of 3 x 6."""
    return tuple(torch.randn(batch, 3, tokens, d, generator=generator) for d in (8, 6))  # type: ignore[return-value]


CHANGES: dict[str, Any] = {
    "nothing": lambda layer: None,
    "fewer rows": lambda layer: layer.batch_select_indices(torch.tensor([0, 2])),
    "other rows": lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0, 1])),
    "more rows": lambda layer: layer.batch_repeat_interleave(2),
    "fewer tokens": lambda layer: layer.crop(-2),
    "from the start": lambda layer: layer.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_update_gives_what_transformers_gives(change: str) -> None:
    from transformers.cache_utils import DynamicLayer

    generator = torch.Generator().manual_seed(0)
    theirs, ours = DynamicLayer(), RoomyLayer(8)
    batch = 4
    for step, count in enumerate((5, 1, 1, 1, 1, 3)):  # twelve: more than there is room for
        new = states(generator, batch, count)
        wanted, found = theirs.update(*new), ours.update(*new)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        assert theirs.get_seq_length() == ours.get_seq_length()
        if step == 2:
            for layer in (theirs, ours):
                CHANGES[change](layer)
            batch = theirs.keys.shape[0] if theirs.keys is not None else batch


def test_what_is_there_is_not_copied_again_and_leaves_with_its_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = RoomyLayer(6)
    places = {layer.update(*states(generator, 4, n))[0].data_ptr() for n in (3, 1, 1, 1)}
    assert len(places) == 1
    whole_bytes = layer.keys.untyped_storage().nbytes()
    assert whole_bytes == 4 * 3 * 6 * 8 * 4
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.keys.untyped_storage().nbytes() * 4 == whole_bytes
    assert not layer._rooms


def test_layers_with_a_window_stay_as_they_are() -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(num_hidden_layers=2, sliding_window=8)
    kinds = [type(layer).__name__ for layer in room_cache(config, 5).layers]
    assert sorted(kinds) == ["DynamicSlidingWindowLayer", "RoomyLayer"]
