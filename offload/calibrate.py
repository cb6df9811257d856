"""Constants for the search, fitted from a few layers of the very model.

They run with random weights and several numbers of tokens: that is what products, with norms, calls
and whatever else the model does, take. Then they run beside plain reads of a spill file, which
share cores and DRAM with them; and at last managed, for what the engine adds (offload/handling.py).
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.config import Tuning
from offload.handling import Stopwatch, handling
from offload.prefetch.generation import Weights
from offload.shape import layers_of, model_of, read_shape, weight_type
from offload.tiers.compute_probe import attend_rate
from offload.tiers.drag_probe import contention
from offload.tiers.layout import choose_chunk_bytes
from offload.tiers.probe import keep, remembered_at
from offload.tiers.spec import MIB, Compute, Machine

VOCABULARY = 256
TOKENS = (1, 2, 8, 32, 128, 512)
SAMPLE_BYTES = 192 * MIB  # of layers: more than a cache holds
ROUNDS = 5
# Of a configuration: a file has them and the model that was made from it may not, or otherwise.
_NOT_OF_LAYERS = ("_name_or_path", "architectures", "dtype")
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
    sample = few_layers(config, _sample_layers(config)).to_dict()
    said = {k: v for k, v in sorted(sample.items()) if k not in _NOT_OF_LAYERS}
    stored = weight_type(config, None), weight_dtype
    rates = machine.to_dict()  # the managed sample is planned by them
    asked = [said, stored, torch.get_num_threads(), torch.__version__, rates]
    name = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16]
    return remembered_at(folder, f"compute-{name}")


def calibrate(config: Any, weight_dtype: str | None, folder: Path, machine: Machine) -> Compute:
    """Measure; some twenty seconds. Needs memory for some layers, 192 MiB of them or two, and half
    as much again.

    ``machine``: the rates of the disk under ``folder``, where 256 MiB are read, or as much as the
    layers have. Raises DiskFull and SpillError.
    """
    stored = weight_type(config, None if weight_dtype in ("int4", "int8") else weight_dtype)
    with torch.no_grad():
        model = _sample(config, weight_dtype)
        weights = read_shape(config, weight_dtype).weights
        products = _products(model, weights)
        elements = weights.touched_elements(1) * len(layers_of(model))
        shared = contention(lambda: _run(model, BESIDE_TOKENS), folder)
        # Chunks as in a run with half of the weights in memory.
        chunk_bytes = choose_chunk_bytes(weights.pass_bytes // 4, 2)
        tuning = Tuning(chunk_bytes=chunk_bytes, machine=machine, keep_hooks=True)
        added = handling(
            model, lambda: _sample(config, weight_dtype), lambda m: _run(m, 1), folder, tuning,
            shared[0],
        )  # fmt: skip
        products[1] = added.plain_s / elements
        return Compute(
            tuple(products.items()), attend_rate(getattr(torch, stored)), *shared,
            handling_s=added.layer_s, pass_s=added.pass_s,
        )  # fmt: skip


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
    """What `calibrate` holds of layers, at most.

    A sample, and half of a managed one; codes beside the weights that they are made from.
    """
    plain_bytes = (
        _sample_layers(config) * read_shape(config, weight_type(config, None)).weights.layer_bytes
    )
    return 2 * plain_bytes if weight_dtype in ("int4", "int8") else plain_bytes * 3 // 2


def _sample_layers(config: Any) -> int:
    plain = read_shape(config, weight_type(config, None)).weights
    return min(max(-(-SAMPLE_BYTES // plain.layer_bytes), 2), plain.layers)


def _sample(config: Any, weight_dtype: str | None) -> nn.Module:
    count = _sample_layers(config)
    model = _floating(few_layers(config, count), weight_dtype)
    _pack(model, weight_dtype)
    return model


def _products(model: nn.Module, weights: Weights) -> dict[int, float]:
    """By tokens: seconds for each weight that so many are expected to be multiplied with.

    In rounds: a slow moment of the machine then hits all of them.
    """
    layers = layers_of(model)
    watch = Stopwatch(layers)
    taken: dict[int, list[float]] = {tokens: [] for tokens in TOKENS}
    for _ in range(ROUNDS + 1):  # the first one warms up
        for tokens, each in taken.items():
            _run(model, tokens)
            each.append(watch.taken_s / (weights.touched_elements(tokens) * len(layers)))
    return {tokens: statistics.median(each[1:]) for tokens, each in taken.items()}


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
