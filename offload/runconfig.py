"""The configuration of one fine-tuning run: frozen dataclasses. For YAML see settings.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from offload.settings import InputError as InputError  # most of its raisers know it from here
from offload.settings import absolute, absolute_model, build, convert, real, whole

TINY_MODEL = "tiny-llama-30m"
DTYPES = ("float32", "bfloat16")
STATE_BYTES = {None: 8.0, "bf16": 4.0, "int8": 2.04}  # of AdamW's two moments, per parameter
PRETRAINED_LR = 2e-5
RANDOM_INIT_LR = 1e-3


@dataclass(frozen=True, slots=True)
class DataConfig:
    """What is read, and how much of it makes one optimizer step."""

    path: str | None = None  # None: the source files of Python's own standard library
    seq_len: int = whole(512, 2)
    batch_size: int = whole(1, 1)
    accumulate: int = whole(1, 1)
    eval_fraction: float = real(0.01, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """When things happen, in optimizer steps. ``eval_every`` and ``save_every`` 0: never."""

    steps: int = whole(100, 1)
    warmup: int = whole(10, 0)
    eval_every: int = whole(50, 0)
    save_every: int = whole(100, 0)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW. ``max_grad_norm`` 0 turns clipping off, without which the update of
    ``step_in_backward`` waits for the norm. That and ``state_dtype``: see ``offload.wrap``.
    """

    lr: float = real(PRETRAINED_LR, 0.0)
    weight_decay: float = real(0.01, 0.0)
    max_grad_norm: float = real(1.0, 0.0)
    state_dtype: str | None = None
    step_in_backward: bool = False


@dataclass(frozen=True, slots=True)
class ComputeConfig:
    """How the numbers are made. ``bf16``: bfloat16 arithmetic over parameters kept in ``dtype``."""

    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = whole(0, 0)


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Budgets. None: for memory, what the machine has free; for ``disk``, no disk tier."""

    device_memory: int | str | None = None
    host_memory: int | str | None = None
    disk: str | None = None
    disk_memory: int | str | None = None

    def absolute(self) -> MemoryConfig:
        """The same, whatever directory a later command starts in."""
        return replace(self, disk=self.disk and absolute(self.disk))

    def check(self) -> None:
        """Raises InputError for a disk budget without a disk."""
        if self.disk_memory is not None and self.disk is None:
            raise InputError("memory.disk_memory needs a place: give --disk DIR")


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


def build_config(values: Mapping[str, Any]) -> RunConfig:
    """The configuration of flat ``{key path: value}``; keys left out take their defaults.

    Raises InputError as `settings.build`, and for values that do not go together. Two defaults
    depend on other values: a randomly initialised model gets a larger ``optimizer.lr``, and
    ``schedule.warmup`` is a tenth of the steps, at most 100.
    """
    model = convert(RunConfig, "model", values.get("model", TINY_MODEL), "model")
    config = build(RunConfig, {**_dependent_defaults(model, values), **values})
    _check_together(config)
    return config


def _dependent_defaults(model: str, values: Mapping[str, Any]) -> dict[str, Any]:
    steps = values.get("schedule.steps", ScheduleConfig().steps)
    return {
        "optimizer.lr": RANDOM_INIT_LR if model == TINY_MODEL else PRETRAINED_LR,
        "schedule.warmup": min(100, steps // 10) if isinstance(steps, int) and steps > 0 else 0,
    }


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run, whatever directory a later command starts in."""
    data = replace(config.data, path=config.data.path and absolute(config.data.path))
    return replace(
        config, model=absolute_model(config.model), output=absolute(config.output), data=data,
        memory=config.memory.absolute(),
    )  # fmt: skip


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
    config.memory.check()
    if config.data.path == "":
        raise InputError("data.path is empty; name a file, a directory or a glob")
