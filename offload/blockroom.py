"""What a block of rows takes of memory, told from a model's configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from offload.places import BlockCost

LOGITS_COPIES = 4  # float32 scores, sorted, their order and their shares


def block_cost(model: nn.Module, computed: torch.dtype | None = None) -> BlockCost:
    """Bytes by token and row. A configuration that does not say takes the usual shape.

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
    inner = _number(text, "intermediate_size", "ffn_dim", "n_inner", "d_ff") or 4 * width
    return BlockCost(
        position_bytes=2 * int(text.num_hidden_layers) * kv_heads * head_width * size_bytes,
        token_bytes=(6 * width + 3 * inner + 4 * kv_heads * head_width) * size_bytes,
        waiting_bytes=3 * width * size_bytes,
        layers=int(text.num_hidden_layers),
        row_bytes=LOGITS_COPIES * 4 * int(text.vocab_size),
    )


def largest_unit_bytes(model: nn.Module) -> int:
    """The weights that one module computes with at once; of a lookup's table a few rows are."""
    return max(
        sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
    )


def _number(config: Any, *names: str) -> int:
    """The first of these that the configuration has as a number; 0: none."""
    return next((int(n) for name in names if isinstance(n := getattr(config, name, None), int)), 0)


def positions_of(model_config: Any) -> int | None:
    """How many positions the model has; None: it does not say."""
    found = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(found) if found else None
