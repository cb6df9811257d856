"""Write a model as a Hugging Face directory that plain ``from_pretrained`` loads, streamed."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from offload.errors import OffloadError
from offload.manifest import write_json
from offload.publish import fsync_folder
from offload.quantised import Quantised
from offload.run import Runtime
from offload.stream import between_steps, spec_of, write_tensors
from offload.stsafe import Spec, shard
from offload.tiers.spec import GIB

SHARD_BYTES = 2 * GIB
_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def export(run: Runtime, path: str | os.PathLike[str]) -> None:
    """Write weights, and for transformers models the configuration, into directory ``path``.

    Weights are safetensors files of at most 2 GiB under the model's own names, tied ones once.
    Other files in the directory (a tokenizer) stay; weights of an earlier export are replaced.

    Raises OffloadError for models with adapters or quantised weights, and when the directory
    cannot be written.
    """
    model, target = run.model, Path(path)
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise OffloadError("a model with adapters cannot be exported: merge_and_unload() it first")
    if any(isinstance(m, Quantised) for m in model.modules()):
        raise OffloadError(
            "a model with quantised weights cannot be exported: its codes are nothing that "
            "from_pretrained loads. Export it as it was loaded, without weight_dtype=..."
        )
    tensors = _exported(model)
    fresh = target / ".export.partial"
    engine = run.parts.engine
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        with between_steps(engine), ThreadPoolExecutor(1, "hash") as helper:
            shards = shard((spec_of(k, t) for k, t in tensors.items()), SHARD_BYTES)
            names = _file_names(len(shards))
            for name, specs in zip(names, shards, strict=True):
                write_tensors(engine, fresh / name, specs, tensors, helper)
            if len(shards) > 1:
                write_json(fresh / _INDEX, _index(names, shards), helper)
        _write_config(model, fresh)
        _move(fresh, target)
    except OSError as error:
        raise OffloadError(f"{target} could not be written: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _exported(model: nn.Module) -> dict[str, Tensor]:
    """Tensors by the name a plain load expects; of tied ones those that the others are tied to."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and name not in ignored:
            groups.setdefault(id(value), []).append((name, value))
    kept: list[tuple[str, Tensor]] = []
    for named in groups.values():
        # Names tied by other means than the model's declaration are all written: a load that
        # does not know of the tie then finds each.
        kept += [n for n in named if n[0] not in tied] or named[:1]
    return dict(kept)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _index(names: Sequence[str], shards: Sequence[Sequence[Spec]]) -> Mapping[str, Any]:
    return {
        "metadata": {"total_size": sum(s.size_bytes for specs in shards for s in specs)},
        "weight_map": {
            s.name: name for name, specs in zip(names, shards, strict=True) for s in specs
        },
    }


def _write_config(model: Any, folder: Path) -> None:
    """What transformers needs to build the model again; nothing for other models."""
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        return
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _move(fresh: Path, target: Path) -> None:
    """Put complete files in place, the weights of an earlier export removed."""
    new = {p.name for p in fresh.iterdir()}
    for old in target.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name not in new:
            old.unlink()
    for name in sorted(new, key=lambda n: n == "config.json"):
        os.replace(fresh / name, target / name)
    fsync_folder(target)
