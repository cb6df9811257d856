"""A model's shape for the search, exact and without its weights: built on the meta device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.errors import OffloadError
from offload.prefetch.generation import Experts, RowCost, Shape, Weights
from offload.runconfig import TINY_MODEL
from offload.tinymodel import tiny_config

LOGITS_COPIES = 4  # float32 scores, sorted, their order and their shares
_BITS = {"int4": 4, "int8": 8}
_GROUP = 64  # weights that share a scale and a zero of two bytes each
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
DTYPES = ("float32", "bfloat16", "float16")


def read_config(place: str) -> Any:
    """The ``transformers`` configuration in a directory or config.json, or of a hub name.

    ``tiny-llama-30m`` is the built-in one. Raises OffloadError where there is none.
    """
    if place == TINY_MODEL:
        return tiny_config()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(Path(place).expanduser() if _is_local(place) else place)
    except (OSError, ValueError) as error:
        raise OffloadError(f"no model configuration in {place}: {error}") from error


def weight_type(config: Any, weight_dtype: str | None) -> str:
    """How products' weights are stored: as asked for or, by default, as the configuration says.

    Raises OffloadError for a type that is not known.
    """
    own = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if weight_dtype not in (None, *DTYPES, *_BITS):
        known = ", ".join((*DTYPES, *_BITS))
        raise OffloadError(f"weight_dtype={weight_dtype!r}: give one of {known}")
    return weight_dtype or own


def _is_local(place: str) -> bool:
    return Path(place).expanduser().exists()


def read_shape(config: Any, weight_dtype: str | None = None) -> Shape:
    """Bytes and elements of the causal language model of a configuration.

    ``weight_dtype``: None: as the configuration says (float32 where it does not); a floating type;
    or "int4" or "int8": codes for the weights of linear layers. Raises OffloadError for models
    with an encoder, without repeated layers, or with experts that are not stacked in one tensor.
    """
    text = config.get_text_config(decoder=True)
    dtype = weight_type(config, weight_dtype)
    dtype = weight_type(config, None) if dtype in _BITS else dtype
    with torch.device("meta"):
        model = model_of(config, dtype)
    itemsize = getattr(torch, dtype).itemsize
    layers = layers_of(model)
    weights = _weights(model, layers, weight_dtype)
    weights = replace(weights, experts=_experts(text, layers))
    return Shape(weights, _rows(text, itemsize))


def model_of(config: Any, dtype: str) -> nn.Module:
    """The causal language model of a configuration, initialised. Raises OffloadError."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))  # type: ignore[no-any-return]
    except ValueError as error:
        raise OffloadError(f"plan: not a causal language model: {error}") from error


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The longest list of blocks of one class. Raises OffloadError where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise OffloadError("plan: this model has no list of layers to pass through")
    return max(lists, key=len)


def _weights(model: nn.Module, layers: nn.ModuleList, weight_dtype: str | None) -> Weights:
    """Weights that a head shares with a lookup count as the head's."""
    inside = {id(m) for m in layers.modules()}
    stored, elements, lookup_bytes, unit_bytes = [0, 0], [0, 0], 0, 0
    products = {id(m.weight) for m in model.modules() if not isinstance(m, nn.Embedding)
                if isinstance(getattr(m, "weight", None), nn.Parameter)}  # fmt: skip
    seen: set[int] = set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        own_bytes = sum(_stored_bytes(module, p, weight_dtype) for p in own)
        if isinstance(module, nn.Embedding):
            tied = id(module.weight) in products
            # A head stored as codes has them beside the table that it was tied to.
            lookup_bytes += 0 if tied and weight_dtype not in _BITS else own_bytes
            continue
        seen.update(map(id, own))
        outside = int(id(module) not in inside)
        stored[outside] += own_bytes
        elements[outside] += sum(p.numel() for p in own if p.dim() > 1)
        unit_bytes = max(unit_bytes, own_bytes)
    count = len(layers)
    return Weights(
        count, -(-stored[0] // count), elements[0] // count, stored[1], elements[1],
        lookup_bytes, unit_bytes,
    )  # fmt: skip


def _experts(text: Any, layers: nn.ModuleList) -> Experts:
    """Of a layer, on average; layers without experts count. Raises OffloadError."""
    count, chosen = (next((int(n) for name in names if (n := getattr(text, name, None))), 1)
                     for names in (_EXPERTS, _CHOSEN))  # fmt: skip
    if count <= 1:
        return Experts()
    stacked = [p for p in layers.parameters() if p.dim() == 3 and p.shape[0] == count]
    if not stacked:
        raise OffloadError("plan: the experts of this model are not stacked; not modelled yet")
    elements = sum(p.numel() for p in stacked) // len(layers)
    size_bytes = sum(p.numel() * p.element_size() for p in stacked) // len(layers)
    return Experts(count, min(chosen, count), size_bytes, elements)


def _stored_bytes(module: nn.Module, weight: nn.Parameter, weight_dtype: str | None) -> int:
    linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    if weight_dtype not in _BITS or not linear or weight.dim() != 2:
        return weight.numel() * weight.element_size()
    rows, columns = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
    return rows * -(-columns // _GROUP) * (_GROUP * _BITS[weight_dtype] // 8 + 4)


def _rows(text: Any, itemsize: int) -> RowCost:
    """As the block engine counts; a configuration that does not say takes the usual shape."""
    width, layers = int(text.hidden_size), int(text.num_hidden_layers)
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    kv_heads = int(getattr(text, "num_key_value_heads", 0) or heads)
    head_width = int(getattr(text, "head_dim", 0) or width // heads)
    names = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
    sizes = (getattr(text, name, None) for name in names)
    inner = next((int(n) for n in sizes if isinstance(n, int)), 4 * width)
    return RowCost(
        position_bytes=2 * layers * kv_heads * head_width * itemsize,
        token_bytes=(6 * width + 3 * inner + 4 * kv_heads * head_width) * itemsize,
        waiting_bytes=3 * width * itemsize,
        row_bytes=LOGITS_COPIES * 4 * int(text.vocab_size),
        attention_width=layers * heads * head_width,
    )
