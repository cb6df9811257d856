"""Plain values as JSON, with the tensors among them put aside. Nothing is ever unpickled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.errors import CheckpointError

_TAG = "$"  # JSON objects whose one key starts with this are values that JSON lacks


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON gives it back bit for bit; its tensors go into ``tensors``.

    Understands None, bool, int, float, str, list, tuple, dict, Counter, tensors, numpy arrays
    and scalars, torch dtypes and devices. Raises CheckpointError, naming the place, for others.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), where, tensors)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return _items(value, where, tensors)
    if isinstance(value, tuple):
        return {"$tuple": _items(value, where, tensors)}
    if isinstance(value, Mapping):
        return _encode_mapping(value, where, tensors)
    if isinstance(value, Tensor):
        tensors[where] = value.detach()
        return {"$tensor": where}
    if isinstance(value, np.ndarray):
        tensors[where] = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
        return {"$array": where}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"$device": str(value)}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which a checkpoint cannot hold: only numbers, "
        "strings, lists, tuples, dicts, tensors and arrays are saved (nothing is pickled)"
    )


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith(_TAG):
        return {k: decode(v, tensors) for k, v in value.items()}
    ((tag, inner),) = value.items()
    if tag == "$float":
        return float(inner)
    if tag == "$tuple":
        return tuple(decode(v, tensors) for v in inner)
    if tag in ("$dict", "$counter"):
        pairs = {decode(k, tensors): decode(v, tensors) for k, v in inner}
        return Counter(pairs) if tag == "$counter" else pairs
    if tag == "$tensor":
        return tensors[inner]
    if tag == "$array":
        return tensors[inner].numpy()
    if tag == "$dtype":
        return getattr(torch, inner)
    if tag == "$device":
        return torch.device(inner)
    raise CheckpointError(f"a value of kind {tag} is unknown: saved by a newer version")


def _items(
    values: list[Any] | tuple[Any, ...], where: str, tensors: dict[str, Tensor]
) -> list[Any]:
    return [encode(v, f"{where}[{i}]", tensors) for i, v in enumerate(values)]


def _encode_mapping(value: Mapping[Any, Any], where: str, tensors: dict[str, Tensor]) -> Any:
    counter = isinstance(value, Counter)
    if not counter and all(isinstance(k, str) and not k.startswith(_TAG) for k in value):
        return {k: encode(v, f"{where}.{k}", tensors) for k, v in value.items()}
    pairs = [
        [encode(k, f"a key of {where}", tensors), encode(v, f"{where}[{k!r}]", tensors)]
        for k, v in value.items()
    ]
    return {"$counter" if counter else "$dict": pairs}
