"""A model's shape for the search, exact and without its weights: built on the meta device."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.blockroom import block_cost
from offload.errors import OffloadError
from offload.groupwise import FORMATS
from offload.prefetch.generation import Experts, RowCost, Shape, Weights
from offload.quantised import Quantised, quantise, scratch_bytes
from offload.runconfig import TINY_MODEL
from offload.tinymodel import tiny_config

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
    if weight_dtype not in (None, *DTYPES, *FORMATS):
        known = ", ".join((*DTYPES, *FORMATS))
        raise OffloadError(f"weight_dtype={weight_dtype!r}: give one of {known}")
    return weight_dtype or own


def stored_as(config: Any, dtype: str | None) -> Any:
    """The configuration with this floating type; None: with its own. Raises OffloadError."""
    if dtype is None or weight_type(config, None) == dtype:
        return config
    if dtype not in DTYPES:
        raise OffloadError(f"dtype={dtype!r}: give one of {', '.join(DTYPES)}")
    config = copy.deepcopy(config)
    config.dtype = dtype
    return config


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
    dtype = weight_type(config, None) if dtype in FORMATS else dtype
    with torch.device("meta"):
        model = model_of(config, dtype)
        if weight_dtype in FORMATS:
            codes = partial(torch.empty, dtype=torch.uint8)
            form = FORMATS[weight_dtype]
            quantise(model, form, None, codes, lambda _: None, contents=False)
    layers = layers_of(model)
    weights = replace(_weights(model, layers), experts=_experts(text, layers))
    return Shape(weights, _rows(model, text))


def model_of(config: Any, dtype: str) -> nn.Module:
    """The causal language model of a configuration, initialised. Raises OffloadError."""
    from transformers import AutoModelForCausalLM

    try:
        # Of a copy: the dtype is written into the configuration, which may be a live model's.
        mine = copy.deepcopy(config)
        return AutoModelForCausalLM.from_config(mine, dtype=getattr(torch, dtype))  # type: ignore[no-any-return]
    except ValueError as error:
        raise OffloadError(f"plan: not a causal language model: {error}") from error


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The longest list of blocks of one class. Raises OffloadError where there is none."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise OffloadError("plan: this model has no list of layers to pass through")
    return max(lists, key=len)


def _weights(model: nn.Module, layers: nn.ModuleList) -> Weights:
    """Weights that a head shares with a lookup count as the head's."""
    inside = {id(m) for m in layers.modules()}
    stored, elements, lookup_bytes, unit_bytes = [0, 0], [0, 0], 0, 0
    products = {id(m._parameters.get("weight")) for m in model.modules()
                if not isinstance(m, nn.Embedding)}  # fmt: skip
    seen: set[int] = set()
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        own_bytes = sum(map(_bytes, own))
        if isinstance(module, nn.Embedding):
            lookup_bytes += 0 if id(module.weight) in products else own_bytes
            continue
        seen.update(map(id, own))
        outside = int(id(module) not in inside)
        stored[outside] += own_bytes
        elements[outside] += sum(_factors(module, p) for p in own if p.dim() > 1)
        unit_bytes = max(unit_bytes, own_bytes)
    count = len(layers)
    return Weights(
        count, -(-stored[0] // count), elements[0] // count, stored[1], elements[1],
        lookup_bytes, unit_bytes, largest_bytes=max(map(_bytes, model.parameters())),
        fixed_bytes=sum(map(_bytes, model.buffers())) + scratch_bytes(model),
    )  # fmt: skip


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _factors(module: nn.Module, weight: nn.Parameter) -> int:
    """Elements that are multiplied with; of codes, as many as were packed."""
    if isinstance(module, Quantised) and weight is module.packed:
        return int(weight.shape[0]) * module.columns
    return weight.numel()


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


def _rows(model: nn.Module, text: Any) -> RowCost:
    """As the block engine counts."""
    cost = block_cost(model)
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    head_width = int(getattr(text, "head_dim", 0) or int(text.hidden_size) // heads)
    return RowCost(
        cost.position_bytes, cost.token_bytes, cost.waiting_bytes, cost.row_bytes,
        cost.layers * heads * head_width, cost.result_bytes,
    )  # fmt: skip
