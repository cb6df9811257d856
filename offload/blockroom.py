"""What a block of rows takes of memory, told from a model's configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from offload.hooks import Hooks
from offload.parts import Parts
from offload.places import BlockCost

INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim")
LOGITS_COPIES = 4  # float32 scores, sorted, their order and their shares


def block_cost(model: nn.Module, computed: torch.dtype | None = None) -> BlockCost:
    """Bytes by token and row. A configuration that does not say takes the usual shape.

    In an encoder-decoder keys and values of the prompt are those of the cross-attention.
    ``computed``: what it computes in; None: in the type of its weights.
    """
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    width = int(text.hidden_size)
    kept = next(p.dtype for p in model.parameters() if p.is_floating_point())
    size_bytes = (computed or kept).itemsize
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    kv_heads = int(getattr(text, "num_key_value_heads", 0) or heads)
    head_width = int(getattr(text, "head_dim", 0) or width // heads)
    inner = _number(text, *INNER) or 4 * width
    encodes = bool(config.is_encoder_decoder)
    return BlockCost(
        position_bytes=2 * int(text.num_hidden_layers) * kv_heads * head_width * size_bytes,
        token_bytes=(6 * width + 3 * inner + 4 * kv_heads * head_width) * size_bytes,
        waiting_bytes=3 * width * size_bytes,
        layers=int(text.num_hidden_layers),
        row_bytes=LOGITS_COPIES * 4 * int(text.vocab_size),
        result_bytes=inner * size_bytes,
        encoding_bytes=width * size_bytes * encodes,
    )


def largest_unit_bytes(model: nn.Module) -> int:
    """The weights that one module computes with at once; of a lookup's table a few rows are."""
    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
    )


def block_room_bytes(model: nn.Module, parts: Parts) -> int:
    """What rows and weights may take where rows are computed, beside the largest module's."""
    return parts.computing.ledger.capacity_bytes - largest_unit_bytes(model)


def least_frames_bytes(model: nn.Module, parts: Parts) -> int:
    """Chunks that memory holds at least while a forward pass runs, whatever is evicted.

    Those of the module that has most of them. 0 where none can leave (they are no part of the
    ledger's capacity then), and where weights are computed with in frames: there the engine
    refuses.
    """
    space, homes = parts.engine.space, parts.binding.homes
    if space.disk is None or not isinstance(parts.hooks, Hooks):
        return 0
    most_bytes = 0
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue  # a few rows are read where they lie
        own = [homes[p] for p in module.parameters(recurse=False) if p in homes]
        needed = {c for home in own for c in home.weight_chunks}
        most_bytes = max(most_bytes, sum(space.chunks[c].size_bytes for c in needed))
    return most_bytes


def _number(config: Any, *names: str) -> int:
    """The first of these that the configuration has as a number; 0: none."""
    return next((int(n) for name in names if isinstance(n := getattr(config, name, None), int)), 0)


def positions_of(model_config: Any) -> int | None:
    """How many positions the model has; None: it does not say."""
    found = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(found) if found else None


def longest_prompt(model_config: Any) -> int | None:
    """Tokens that a prompt may have; None: the model does not say.

    A decoder's new tokens need positions too; an encoder has its own.
    """
    if not model_config.is_encoder_decoder:
        found = positions_of(model_config)
        return found - 1 if found else None
    names = "max_encoder_position_embeddings", "max_position_embeddings"
    return _number(model_config, *names) or None
