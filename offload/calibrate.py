"""Constants for the search, fitted from a few layers of the very model.

They run with random weights and several numbers of tokens: that is what products, with norms, calls
and whatever else the model does, take. Then they run beside plain reads of a spill file, which
share cores and DRAM with them. They are not managed themselves: a sample small enough to be quick
has too little room to read ahead in to be typical (docs/log.md).
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.prefetch.generation import Weights
from offload.shape import layers_of, model_of, read_shape, weight_type
from offload.tiers.compute_probe import attend_rate
from offload.tiers.drag_probe import contention
from offload.tiers.probe import keep, remembered_at
from offload.tiers.spec import MIB, Compute, Machine

VOCABULARY = 256
TOKENS = (1, 2, 8, 32, 128, 512)
SAMPLE_BYTES = 192 * MIB  # of layers: more than a cache holds
BESIDE_TOKENS = 32  # computed with while the disk is read: with 1 and 128 the same comes out


def cached_calibration(
    config: Any, weight_dtype: str | None, folder: Path, machine: Machine
) -> Compute:
    """The last calibration for such layers, threads and disk rates, or a new one, then kept."""
    folder.mkdir(parents=True, exist_ok=True)
    found = kept_calibration(config, weight_dtype, folder, machine)
    if found is not None:
        return found
    found = calibrate(config, weight_dtype, folder, machine)
    # Where it cannot be kept the next one measures again.
    keep(_kept_at(config, weight_dtype, folder, machine), found.to_dict())
    return found


def kept_calibration(
    config: Any, weight_dtype: str | None, folder: Path, machine: Machine
) -> Compute | None:
    """The last calibration for such layers, threads and disk rates; None: there is none."""
    try:
        kept = _kept_at(config, weight_dtype, folder, machine)
        return Compute.from_dict(json.loads(kept.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _kept_at(config: Any, weight_dtype: str | None, folder: Path, machine: Machine) -> Path:
    said = {k: v for k, v in sorted(config.to_dict().items()) if k not in ("_name_or_path",)}
    rates = machine.to_dict()  # what the costs of sharing are told in: new rates, new costs
    asked = [said, weight_dtype, torch.get_num_threads(), torch.__version__, rates]
    name = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16]
    return remembered_at(folder, f"compute-{name}")


def calibrate(config: Any, weight_dtype: str | None, folder: Path, machine: Machine) -> Compute:
    """Measure; some eight seconds. Needs memory for some layers: 192 MiB of them, or two.

    ``machine``: the rates of the disk under ``folder``, where 256 MiB are read. Raises DiskFull.
    """
    stored = weight_type(config, None if weight_dtype in ("int4", "int8") else weight_dtype)
    with torch.no_grad():
        model = _sample(config, weight_dtype)
        products = _products(model, read_shape(config, weight_dtype).weights)
        shared = contention(lambda: _run(model, BESIDE_TOKENS), folder, machine.read_bytes_per_s)
        return Compute(products, attend_rate(getattr(torch, stored)), *shared)


def few_layers(config: Any, layers: int) -> Any:
    """The configuration with so many layers and hardly any vocabulary."""
    small = copy.deepcopy(config)
    text = small.get_text_config(decoder=True)
    text.num_hidden_layers, text.vocab_size = layers, VOCABULARY
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return small


def sample_bytes(config: Any, weight_dtype: str | None) -> int:
    """What `calibrate` holds of layers, at most."""
    plain = read_shape(config, weight_type(config, None)).weights
    packed = 2 if weight_dtype in ("int4", "int8") else 1  # beside the weights it is made from
    return packed * _sample_layers(config) * plain.layer_bytes


def _sample_layers(config: Any) -> int:
    plain = read_shape(config, weight_type(config, None)).weights
    return min(max(-(-SAMPLE_BYTES // plain.layer_bytes), 2), plain.layers)


def _sample(config: Any, weight_dtype: str | None) -> nn.Module:
    count = _sample_layers(config)
    model = _floating(few_layers(config, count), weight_dtype)
    _pack(model, weight_dtype)
    return model


def _products(model: nn.Module, weights: Weights) -> tuple[tuple[int, float], ...]:
    """(tokens, seconds for each weight that so many are expected to be multiplied with)."""
    layers, seen = layers_of(model), [0.0, 0.0]

    def begin(*_: object) -> None:
        seen[0] = time.perf_counter()

    def end(*_: object) -> None:
        seen[1] = time.perf_counter()

    layers[0].register_forward_pre_hook(begin)
    layers[-1].register_forward_hook(end)
    found = []
    for tokens in TOKENS:
        taken = []
        for _ in range(4):
            _run(model, tokens)
            taken.append(seen[1] - seen[0])
        elements = weights.touched_elements(tokens) * len(layers)
        found.append((tokens, statistics.median(taken[1:]) / elements))
    return tuple(found)


def _floating(config: Any, weight_dtype: str | None) -> nn.Module:
    stored = weight_type(config, None if weight_dtype in ("int4", "int8") else weight_dtype)
    return model_of(config, stored).eval()


def _pack(model: nn.Module, weight_dtype: str | None) -> None:
    from offload.groupwise import format_of
    from offload.quantised import quantise

    if weight_dtype not in ("int4", "int8"):
        return
    form = format_of(weight_dtype)
    assert form is not None
    quantise(model, form, None, lambda s: torch.empty(s, dtype=torch.uint8), lambda _: None)


def _run(model: nn.Module, tokens: int) -> None:
    """One token in each of up to 32 rows; more as longer rows. Experts are routed to by chance."""
    rows = min(tokens, 32)
    ids = torch.randint(0, VOCABULARY, (rows, tokens // rows))
    model(input_ids=ids, use_cache=False)
