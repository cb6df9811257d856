"""Save and load everything a run needs to go on with the same bits.

A checkpoint is a directory: weights and optimizer state in safetensors shards (state is named
``PARAMETER::STATE``), everything else in ``run.json`` with its tensors in ``values.safetensors``,
and ``manifest.json``, written last, with the size and sha256 of each file. Tensors are streamed
chunk by chunk through the engine, within the budgets. Nothing is pickled.

Gradients are not saved: save between ``optimizer.step()`` and the next forward pass.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.bind import tensor_at
from offload.codec import decode, encode
from offload.engine import Engine
from offload.errors import CheckpointError
from offload.manifest import is_checkpoint, read_json, read_manifest, write_json, write_manifest
from offload.publish import existing, replacing
from offload.run import Runtime
from offload.stream import between_steps, fill_tensor, spec_of, write_tensors
from offload.stsafe import (
    DTYPES,
    VERIFY_BYTES,
    FileRecord,
    HashingReader,
    Spec,
    code_of,
    damaged,
    no_space,
    shard,
)
from offload.tiers.home import CorruptChunk
from offload.tiers.spec import GIB, MIB, format_size

SHARD_BYTES = GIB
RECORD, VALUES = "run.json", "values.safetensors"
_SPARE_BYTES = 4 * MIB  # headers, JSON and directory entries
_EXTRA_STATE = "_extra_state"  # the name that nn.Module.get_extra_state has in a state_dict


@dataclass(frozen=True, slots=True, eq=False)
class _Contents:
    """What is saved: tensors by name, and the rest as JSON."""

    weights: Mapping[str, Tensor]
    states: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    record: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        tensors = (*self.weights.values(), *self.states.values(), *self.values.values())
        return sum(t.numel() * t.element_size() for t in tensors)


# -- saving ---------------------------------------------------------------------------------


def save(
    run: Runtime,
    path: str | os.PathLike[str],
    *,
    scheduler: Any = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint directory, whole or not at all; one that is there is replaced at once.

    Holds weights, persistent buffers, optimizer, ``scheduler`` (anything with ``state_dict``),
    the random states of torch, CUDA, Python and numpy, and ``extra``: numbers, strings, lists,
    dicts, tensors. Gradients are not saved.

    Raises CheckpointError when it cannot be written; what was there before is then untouched
    and training can go on.
    """
    engine = run.parts.engine
    contents = _contents(run, scheduler, extra)
    try:
        with (
            between_steps(engine),
            ThreadPoolExecutor(1, "hash") as helper,
            replacing(Path(path), is_checkpoint) as folder,
        ):
            _check_space(folder, contents.size_bytes)
            files = _write_shards(engine, folder, "weights", contents.weights, helper)
            files |= _write_shards(engine, folder, "optimizer", contents.states, helper)
            specs = [spec_of(k, v) for k, v in contents.values.items()]
            files[VALUES] = write_tensors(engine, folder / VALUES, specs, contents.values, helper)
            files[RECORD] = write_json(folder / RECORD, contents.record, helper)
            write_manifest(folder, files, helper)
    except CorruptChunk:
        raise
    except OSError as error:
        raise _cannot_save(Path(path), error, contents.size_bytes) from error


def _write_shards(
    engine: Engine, folder: Path, stem: str, tensors: Mapping[str, Tensor], helper: ThreadPoolExecutor
) -> dict[str, FileRecord]:
    shards = shard((spec_of(k, v) for k, v in tensors.items()), SHARD_BYTES)
    files = {}
    for i, specs in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        files[name] = write_tensors(engine, folder / name, specs, tensors, helper)
    return files


def _check_space(folder: Path, size_bytes: int) -> None:
    """Refuse at once what would fail after minutes."""
    stat = os.statvfs(folder)
    free_bytes = stat.f_bavail * stat.f_frsize
    if free_bytes < size_bytes + _SPARE_BYTES:
        raise CheckpointError(
            f"{folder.parent} has {format_size(free_bytes)} free, but a checkpoint needs "
            f"{format_size(size_bytes + _SPARE_BYTES)}; nothing was written: delete something "
            "or choose another disk"
        )


def _cannot_save(path: Path, error: OSError, size_bytes: int) -> CheckpointError:
    remedy = "choose another directory"
    if no_space(error):
        remedy = f"free at least {format_size(size_bytes + _SPARE_BYTES)} there"
    return CheckpointError(
        f"the checkpoint {path} could not be written ({error}); an earlier one there is "
        f"untouched, and the run can go on: {remedy}"
    )


def _contents(run: Runtime, scheduler: Any, extra: dict[str, Any] | None) -> _Contents:
    weights = _saved_weights(run.model)
    values: dict[str, Tensor] = {}
    states: dict[str, Tensor] = {}
    record = {
        "torch": str(torch.__version__),
        "weights": {k: [code_of(k, t.dtype), list(t.shape)] for k, t in weights.items()},
        "extra_state": encode(_extra_state(run.model), "extra_state", values),
        "optimizer": _describe_optimizer(run, states, values) if run.optimizer else None,
        "scheduler": encode(
            None if scheduler is None else scheduler.state_dict(), "scheduler", values
        ),
        "rng": encode(_random_states(), "rng", values),
        "extra": encode(extra or {}, "extra", values),
    }
    return _Contents(weights, states, values, record)


def _saved_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, shared ones once."""
    kept = model.state_dict(keep_vars=True).keys()
    buffers = {k: b for k, b in model.named_buffers() if k in kept}
    return dict(model.named_parameters()) | buffers


def _extra_state(model: nn.Module) -> dict[str, Any]:
    """What modules add to their state_dict by ``get_extra_state``, by the module's name."""
    found = model.state_dict(keep_vars=True).items()
    return {
        k.removesuffix(_EXTRA_STATE).removesuffix("."): v
        for k, v in found
        if k.endswith(_EXTRA_STATE)
    }


def _describe_optimizer(
    run: Runtime, states: dict[str, Tensor], values: dict[str, Tensor]
) -> dict[str, Any]:
    """The optimizer as JSON. Tensors of its state go to ``states``, state by state, so that
    neighbouring parameters' pieces of one chunk are read together."""
    optimizer = run.optimizer
    assert optimizer is not None
    names = {p: k for k, p in run.model.named_parameters()}
    described: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, Tensor]] = {}
    for param, entries in optimizer.state.items():
        row = described.setdefault(_name_of(param, names), {})
        for key, value in entries.items():
            full = f"{names[param]}::{key}"
            if isinstance(value, Tensor):
                found.setdefault(key, {})[full] = value
                where = value.device.type
                row[key] = {"$state": [code_of(full, value.dtype), list(value.shape), where]}
            else:
                row[key] = encode(value, full, values)
    for tensors in found.values():
        states.update(tensors)
    groups = [
        {
            "params": [_name_of(p, names) for p in group["params"]],
            "values": encode(_group_values(group), f"param_groups[{i}]", values),
        }
        for i, group in enumerate(optimizer.param_groups)
    ]
    return {"class": _class_name(optimizer), "groups": groups, "state": described}


def _name_of(param: nn.Parameter, names: Mapping[nn.Parameter, str]) -> str:
    if param not in names:
        raise CheckpointError(
            f"the optimizer has a parameter of shape {tuple(param.shape)} that is not in the "
            "model: it has no name to be saved under"
        )
    return names[param]


def _group_values(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _class_name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _random_states() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }


# -- loading --------------------------------------------------------------------------------


def load(run: Runtime, path: str | os.PathLike[str], *, scheduler: Any = None) -> dict[str, Any]:
    """Go on from a checkpoint: everything `save` wrote is put back; returns its ``extra``.

    The run must be of the same model and optimizer, under any budgets. A run without an
    optimizer takes the weights only. Gradients are left as they are.

    Raises CheckpointError, before anything is changed, when the checkpoint is missing, damaged
    (every file's sha256 is checked) or of another model, naming the first difference.
    """
    folder = existing(Path(path))
    files = read_manifest(folder)
    if not {RECORD, VALUES} <= files.keys():
        raise damaged(folder / RECORD, "is not listed")
    engine = run.parts.engine
    record = read_json(folder / RECORD, files[RECORD])
    weights = _saved_weights(run.model)
    _check_weights(folder, record["weights"], weights)
    states = _check_optimizer(folder, record["optimizer"], run)
    _check_scheduler(folder, record["scheduler"], scheduler)
    with between_steps(engine):
        _verify(engine, folder, files)
        values: dict[str, Tensor] = {}
        _read(engine, folder / VALUES, files[VALUES], _Fresh(values))
        for name in sorted(files):
            if name.startswith("weights-"):
                _read(engine, folder / name, files[name], _Known(weights))
            elif name.startswith("optimizer-") and run.optimizer is not None:
                _read(engine, folder / name, files[name], states)
    for weight in weights.values():
        torch.autograd.graph.increment_version(weight)  # as load_state_dict would
    for name, value in decode(record["extra_state"], values).items():
        run.model.get_submodule(name).set_extra_state(value)
    if run.optimizer is not None:
        _restore_optimizer(run, record["optimizer"], states, values)
    if scheduler is not None:
        scheduler.load_state_dict(decode(record["scheduler"], values))
    _restore_random(decode(record["rng"], values))
    extra: dict[str, Any] = decode(record["extra"], values)
    return extra
