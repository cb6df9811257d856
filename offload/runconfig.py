"""The configuration of one fine-tuning run: frozen dataclasses, YAML in and out.

Every value has a key path (``optimizer.lr``); errors name it. Sizes stay as the user wrote
them (``"8GiB"`` or bytes), so that the YAML written beside a run reads like the command.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from offload.errors import OffloadError
from offload.tiers.spec import parse_size

TINY_MODEL = "tiny-llama-30m"
DTYPES = ("float32", "bfloat16")
STATE_BYTES = {None: 8.0, "bf16": 4.0, "int8": 2.04}  # of AdamW's two moments, per parameter
PRETRAINED_LR = 2e-5
RANDOM_INIT_LR = 1e-3


class InputError(OffloadError):
    """What the user gave cannot work. The message is one line: the place, then the remedy."""


def _whole(default: int, least: int) -> int:
    number: int = field(default=default, metadata={"least": least})
    return number


def _real(default: float, least: float, below: float = math.inf) -> float:
    number: float = field(default=default, metadata={"least": least, "below": below})
    return number


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is read, and how much of it makes one optimizer step."""

    path: str | None = None  # None: the source files of Python's own standard library
    seq_len: int = _whole(512, 2)
    batch_size: int = _whole(1, 1)
    accumulate: int = _whole(1, 1)
    eval_fraction: float = _real(0.01, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """When things happen, in optimizer steps. ``eval_every`` and ``save_every`` 0: never."""

    steps: int = _whole(100, 1)
    warmup: int = _whole(10, 0)
    eval_every: int = _whole(50, 0)
    save_every: int = _whole(100, 0)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW. ``max_grad_norm`` 0 turns clipping off. ``state_dtype``: see ``offload.wrap``."""

    lr: float = _real(PRETRAINED_LR, 0.0)
    weight_decay: float = _real(0.01, 0.0)
    max_grad_norm: float = _real(1.0, 0.0)
    state_dtype: str | None = None


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """How the numbers are made. ``bf16``: bfloat16 arithmetic over parameters kept in ``dtype``."""

    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = _whole(0, 0)


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Budgets. None: for memory, what the machine has free; for ``disk``, no disk tier."""

    device_memory: int | str | None = None
    host_memory: int | str | None = None
    disk: str | None = None
    disk_memory: int | str | None = None


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that decides what a run computes and where it leaves its results."""

    model: str = TINY_MODEL
    output: str = "runs/finetune"
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "schedule": ScheduleConfig,
    "optimizer": OptimizerConfig,
    "compute": ComputeConfig,
    "memory": MemoryConfig,
}


def key_paths() -> list[str]:
    """Every key a configuration may hold, e.g. ``model`` and ``optimizer.lr``."""
    top = [f.name for f in fields(RunConfig) if f.name not in SECTIONS]
    return top + [f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in fields(kind)]


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of flat ``{key path: value}``; keys left out take their defaults.

    Raises InputError for an unknown key (with the nearest known one), a wrong type or a value
    out of range. Two defaults depend on other values: a randomly initialised model gets a larger
    ``optimizer.lr``, and ``schedule.warmup`` is a tenth of the steps, at most 100.
    """
    known = key_paths()
    for key in values:
        if key not in known:
            raise InputError(_unknown_key(key, known))
    model = _convert(RunConfig, "model", values.get("model", TINY_MODEL), "model")
    values = {**_dependent_defaults(model, values), **values}
    sections = {name: _section(name, kind, values) for name, kind in SECTIONS.items()}
    output = _convert(RunConfig, "output", values.get("output", RunConfig().output), "output")
    config = RunConfig(model=model, output=output, **sections)
    _check_together(config)
    return config


def _dependent_defaults(model: str, values: Mapping[str, Any]) -> dict[str, Any]:
    steps = values.get("schedule.steps", ScheduleConfig().steps)
    return {
        "optimizer.lr": RANDOM_INIT_LR if model == TINY_MODEL else PRETRAINED_LR,
        "schedule.warmup": min(100, steps // 10) if isinstance(steps, int) and steps > 0 else 0,
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """The flat ``{key path: value}`` of a YAML file. InputError if it is not one."""
    import yaml

    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"{path} is not valid YAML: {line}; correct that place") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{path} must hold keys such as 'model:' and 'data:', not a {type(tree).__name__}"
        )
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in SECTIONS:
            flat[str(key)] = value
        elif isinstance(value, dict):
            flat |= {f"{key}.{leaf}": inner for leaf, inner in value.items()}
        elif value is not None:
            raise InputError(f"{path}: {key} must hold keys such as {key}.{_first(key)}")
    return flat


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; ``read_yaml`` and ``build_config`` give it back equal."""
    import yaml

    text: str = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    return text


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever directory a later command starts in."""
    data = replace(config.data, path=config.data.path and _absolute(config.data.path))
    memory = replace(config.memory, disk=config.memory.disk and _absolute(config.memory.disk))
    model = _absolute(config.model) if Path(config.model).expanduser().is_dir() else config.model
    return replace(config, model=model, output=_absolute(config.output), data=data, memory=memory)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _first(section: str) -> str:
    return fields(SECTIONS[section])[0].name


def _section(name: str, kind: type, values: Mapping[str, Any]) -> Any:
    given = {f.name: f"{name}.{f.name}" for f in fields(kind) if f"{name}.{f.name}" in values}
    return kind(**{leaf: _convert(kind, leaf, values[key], key) for leaf, key in given.items()})


def _convert(owner: type, leaf: str, value: Any, key: str) -> Any:
    """``value`` as the type of ``owner.leaf``, inside its range, or InputError."""
    hint = get_type_hints(owner)[leaf]
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if int in kinds and str in kinds:
        return _size(value, key)
    kind = kinds[0]
    if kind is float and not isinstance(value, bool):
        value = _as_float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{key} must be {_NAMES[kind]}, not {value!r}")
    limits = {f.name: f.metadata for f in fields(owner)}[leaf]
    least, below = limits.get("least"), limits.get("below", math.inf)
    if least is not None and not least <= value < below:
        upper = "" if below == math.inf else f" and below {below:g}"
        raise InputError(f"{key} must be at least {least:g}{upper}, not {value!r}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _size(value: Any, key: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise InputError(f"{key} must be a size such as 8GiB, not {value!r}")
    try:
        parse_size(value)
    except ValueError as error:
        raise InputError(f"{key}: {error}") from error
    return value


def _as_float(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 (no dot) as text; people mean the number.
    if isinstance(value, int | str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_together(config: RunConfig) -> None:
    if config.compute.dtype not in DTYPES:
        options = " or ".join(DTYPES)
        raise InputError(f"compute.dtype must be {options}, not {config.compute.dtype!r}")
    if config.optimizer.state_dtype not in STATE_BYTES:
        options = " or ".join(str(name) for name in STATE_BYTES if name)
        raise InputError(
            f"optimizer.state_dtype must be {options}, not {config.optimizer.state_dtype!r}"
        )
    if config.schedule.warmup >= config.schedule.steps > 1:
        raise InputError(
            f"schedule.warmup ({config.schedule.warmup}) must be below schedule.steps "
            f"({config.schedule.steps}); lower --warmup"
        )
    if config.memory.disk_memory is not None and config.memory.disk is None:
        raise InputError("memory.disk_memory needs a place: give --disk DIR")
    if config.data.path == "":
        raise InputError("data.path is empty; name a file, a directory or a glob")


def _unknown_key(key: str, known: list[str]) -> str:
    leaves = {path.rsplit(".", 1)[-1]: path for path in known}
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        near = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    hint = f"did you mean '{near[0]}'?" if near else "known keys: " + ", ".join(known)
    return f"unknown configuration key '{key}'; {hint}"
