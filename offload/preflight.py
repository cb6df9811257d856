"""Everything that can be refused is refused here, before the first long work.

The checks read a model's configuration, never its weights, and touch no budget: the engine
itself refuses budgets that are too small, with the smallest that works.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload import data
from offload.runconfig import STATE_BYTES, TINY_MODEL, InputError, MemoryConfig, RunConfig
from offload.rundir import RunDirectory
from offload.tiers.spec import format_size, parse_size
from offload.tinymodel import tiny_config, train_tokenizer
from offload.writable import check_writable, nearest

WEIGHT_BYTES = 4  # at most, per parameter
_CHECKPOINTS_AT_ONCE = 3  # two kept and one being written
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class Job:
    """A checked run: what to train, on which tokens.

    ``factory`` makes the model with random weights; None: load it from ``config.model``.
    """

    config: RunConfig
    rundir: RunDirectory
    tokenizer: Any
    train: data.Blocks
    held_out: data.Blocks
    factory: Callable[[], Any] | None


def prepare(config: RunConfig, *, resume: bool, dry: bool = False) -> Job:
    """Check every input, then read and pack the data. ``dry``: nothing is written, no folder made.

    Raises InputError, one line with its remedy, for the first thing that cannot work.
    """
    rundir = RunDirectory(Path(config.output))
    files = data.find_files(config.data.path)
    model_config = read_model_config(config.model)
    _check_length(model_config, config.data.seq_len)
    check_spill_directory(config.memory, dry=dry)
    rundir.open(resume=resume, dry=dry)
    _check_output_space(rundir.root, model_config, config)
    records = list(data.read_records(files))
    if not records:
        raise InputError(f"no text in {config.data.path}; every file is empty")
    tokenizer = _tokenizer(config, rundir, records, resume=resume, dry=dry)
    data.use_fallback_template(tokenizer, records)
    blocks = data.pack(records, tokenizer, config.data.seq_len, config.compute.seed)
    train, held_out = data.split(blocks, config.data)
    return Job(config, rundir, tokenizer, train, held_out, _factory(config, model_config))


def parameter_count(model_config: Any) -> int:
    """How many parameters the model has; none is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    return sum(p.numel() for p in model.parameters())


def _factory(config: RunConfig, model_config: Any) -> Callable[[], Any] | None:
    if config.model != TINY_MODEL:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.compute.dtype)
    return lambda: AutoModelForCausalLM.from_config(model_config, dtype=dtype)


def read_model_config(model: str) -> Any:
    """The configuration of a model directory or hub name. Raises InputError."""
    if model == TINY_MODEL:
        return tiny_config()
    from transformers import AutoConfig

    place = Path(model).expanduser()
    if place.is_dir():
        _check_model_directory(place)
    elif place.exists() or not _HUB_NAME.fullmatch(model):
        raise InputError(
            f"no model directory {model}; give a Hugging Face directory, a hub name "
            f"such as org/name, or {TINY_MODEL}"
        )
    try:
        return AutoConfig.from_pretrained(str(place) if place.is_dir() else model)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot load the model '{model}': it is no directory here and the hub did not give "
            f"it ({_first_line(error)}); check --model"
        ) from error


def _check_model_directory(place: Path) -> None:
    if not (place / "config.json").is_file():
        raise InputError(f"{place} has no config.json, so it is no Hugging Face model directory")
    if not any(next(place.glob(pattern), None) for pattern in _WEIGHT_FILES):
        raise InputError(f"{place} has no weights ({' or '.join(_WEIGHT_FILES)}); download them")


def _check_length(model_config: Any, seq_len: int) -> None:
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise InputError(
            f"data.seq_len is {seq_len}, but the model has {positions} positions; "
            f"use --seq-len {positions} or less"
        )


def check_spill_directory(memory: MemoryConfig, *, dry: bool = False) -> None:
    """Raises InputError where nothing could be spilled there. ``dry``: no folder is made."""
    if memory.disk is None:
        return
    place = Path(memory.disk)
    try:
        check_writable(place, dry=dry)
    except OSError as error:
        raise InputError(
            f"cannot write in the spill directory {place}: {error.strerror}; choose another --disk"
        ) from error
    if memory.disk_memory is None:
        return
    wanted_bytes = parse_size(memory.disk_memory)
    free_bytes = shutil.disk_usage(nearest(place)).free
    if wanted_bytes > free_bytes:
        raise InputError(
            f"--disk-memory is {format_size(wanted_bytes)}, but {place} has "
            f"{format_size(free_bytes)} free; lower it, free space, or choose another --disk"
        )


def _check_output_space(root: Path, model_config: Any, config: RunConfig) -> None:
    """Checkpoints and the exported model must fit: found at the end, that would cost the run."""
    kept = _CHECKPOINTS_AT_ONCE if config.schedule.save_every else 2
    parameters = parameter_count(model_config)
    checkpoint_bytes = WEIGHT_BYTES + STATE_BYTES[config.optimizer.state_dtype]
    needed_bytes = int(parameters * (checkpoint_bytes * kept + WEIGHT_BYTES))
    free_bytes = shutil.disk_usage(nearest(root)).free
    if needed_bytes > free_bytes:
        raise InputError(
            f"checkpoints and the model need up to {format_size(needed_bytes)} in {root}, which "
            f"has {format_size(free_bytes)} free; free space or choose another --output"
        )


def _tokenizer(
    config: RunConfig, rundir: RunDirectory, records: Sequence[data.Record],
    *, resume: bool, dry: bool,
) -> Any:  # fmt: skip
    if config.model == TINY_MODEL and not (resume and rundir.tokenizer.is_dir()):
        tokenizer = train_tokenizer(records)
        if not dry:
            tokenizer.save_pretrained(rundir.tokenizer)
        return tokenizer
    return load_tokenizer(str(rundir.tokenizer) if config.model == TINY_MODEL else config.model)


def load_tokenizer(source: str) -> Any:
    """A model's tokenizer. Raises InputError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"'{source}' has no usable tokenizer ({_first_line(error)}); put the tokenizer files "
            "of the model beside its weights"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
