"""Save and load everything a run needs to go on with the same bits.

A checkpoint is a directory: weights and optimizer state in safetensors shards (state is named
``PARAMETER::STATE``), everything else in ``run.json`` with its tensors in ``values.safetensors``,
and ``manifest.json``, written last, with the size and sha256 of each file. Tensors are streamed
chunk by chunk through the engine, within the budgets. Nothing is pickled.

Gradients are not saved: save between ``optimizer.step()`` and the next forward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.codec import decode
from offload.contents import gather, saved_weights
from offload.engine import Engine
from offload.errors import CheckpointError
from offload.manifest import is_checkpoint, read_json, read_manifest, write_json, write_manifest
from offload.publish import existing, replacing
from offload.restore import (
    StateTargets,
    check_scheduler,
    check_weights,
    restore_modules,
    restore_random,
)
from offload.run import Runtime
from offload.stream import between_steps, fill_tensor, spec_of, write_tensors
from offload.stsafe import (
    VERIFY_BYTES,
    FileRecord,
    HashingReader,
    Spec,
    damaged,
    no_space,
    shard,
)
from offload.tiers.home import CorruptChunk
from offload.tiers.spec import GIB, MIB, format_size

SHARD_BYTES = GIB
RECORD, VALUES = "run.json", "values.safetensors"
_SPARE_BYTES = 4 * MIB  # headers, JSON and directory entries
VERIFIERS = 2  # threads: one hash is slower than the disk


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
    contents = gather(run, scheduler, extra)
    try:
        with (
            ThreadPoolExecutor(1, "hash") as helper,
            replacing(Path(path), is_checkpoint) as folder,
            between_steps(engine),
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
    engine: Engine,
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    helper: ThreadPoolExecutor,
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


# -- loading --------------------------------------------------------------------------------


def load(run: Runtime, path: str | os.PathLike[str], *, scheduler: Any = None) -> dict[str, Any]:
    """Go on from a checkpoint: everything `save` wrote is put back; returns its ``extra``.

    The run must be of the same model and optimizer; budgets may differ. A run without an
    optimizer takes the weights only. Gradients are left as they are.

    Raises CheckpointError, before anything is changed, when the checkpoint is missing, damaged
    (every file's sha256 is checked) or of another model, naming the first difference.
    """
    folder = existing(Path(path))
    files = read_manifest(folder)
    if not {RECORD, VALUES} <= files.keys():
        raise damaged(folder / RECORD, "is not listed")
    record = read_json(folder / RECORD, files[RECORD])
    weights = saved_weights(run.model)
    check_weights(folder, record["weights"], weights)
    check_scheduler(folder, record["scheduler"], scheduler)
    states = StateTargets(run, record["optimizer"], folder)
    engine = run.parts.engine
    values: dict[str, Tensor] = {}
    with between_steps(engine):
        _verify(engine, folder, files)
        _read(engine, folder / VALUES, files[VALUES], partial(_new, values))
        for name in sorted(files):
            if name.startswith("weights-"):
                _read(engine, folder / name, files[name], lambda spec: weights[spec.name])
            elif name.startswith("optimizer-") and run.optimizer is not None:
                _read(engine, folder / name, files[name], states.make)
    for weight in weights.values():
        torch.autograd.graph.increment_version(weight)  # as load_state_dict would
    restore_modules(run.model, record["extra_state"], values)
    states.bind(values)
    if scheduler is not None:
        scheduler.load_state_dict(decode(record["scheduler"], values))
    restore_random(decode(record["rng"], values))
    extra: dict[str, Any] = decode(record["extra"], values)
    return extra


def _verify(engine: Engine, folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Compare every file with its sha256, before a byte of the run is changed."""

    def verify(name: str) -> None:
        with HashingReader(folder / name, files[name]) as reader:
            reader.finish()

    engine.take_other(VERIFIERS * VERIFY_BYTES, "checking a checkpoint")
    try:
        with ThreadPoolExecutor(VERIFIERS, "verify") as pool:
            list(pool.map(verify, files))
    finally:
        engine.ledger.give_other(VERIFIERS * VERIFY_BYTES)


def _read(
    engine: Engine, path: Path, record: FileRecord, target_of: Callable[[Spec], Tensor]
) -> None:
    """Stream one file into the tensors that ``target_of`` names."""
    with HashingReader(path, record) as reader:
        for spec in reader.read_header():
            try:
                target = target_of(spec)
            except KeyError as error:
                raise damaged(path, f"holds {spec.name}, which {RECORD} does not list") from error
            if (spec.dtype, spec.shape) != (target.dtype, tuple(target.shape)):
                raise damaged(path, f"holds {spec.name} as {RECORD} does not")
            fill_tensor(engine, target, reader.read_into)
        reader.finish()


def _new(values: dict[str, Tensor], spec: Spec) -> Tensor:
    """A small tensor of its own."""
    values[spec.name] = torch.empty(spec.shape, dtype=spec.dtype, device="cpu")
    return values[spec.name]
