"""The configuration of one ``offload plan``; keys that runs have too mean the same.

A run's own file will do: what a plan has no use for is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from offload.generateconfig import GenerateConfig
from offload.prefetch.generation import Workload
from offload.runconfig import MemoryConfig, RunConfig
from offload.settings import InputError, build, key_paths, whole

if TYPE_CHECKING:
    from offload.blueprint import FineTune

TASKS = ("finetune", "generate")
TRAINS = ("optimizer.", "schedule.")  # who says something of these means to train
UNMODELLED = ("compute.bf16", "cache.kv_dtype")  # said where they are asked for


@dataclass(frozen=True, slots=True)
class PlanData:
    """One optimizer step. Rows at once of a generation are chosen."""

    seq_len: int = whole(512, 2)
    batch_size: int | None = field(default=None, metadata={"least": 1})
    accumulate: int = whole(1, 1)


@dataclass(frozen=True, slots=True)
class PlanRows:
    """A generation: how many prompts of how many tokens, and whether keys and values may move."""

    prompt_count: int = whole(1, 1)
    prompt_tokens: int = whole(64, 1)
    kv_tiers: bool = False


@dataclass(frozen=True, slots=True)
class PlanSampling:
    """Tokens to add to each prompt."""

    max_new_tokens: int = whole(128, 1)


@dataclass(frozen=True, slots=True)
class PlanOptimizer:
    """AdamW, see ``offload.wrap``."""

    state_dtype: str | None = None
    step_in_backward: bool = False


@dataclass(frozen=True, slots=True)
class PlanAdapters:
    """What is trained: all, or adapters at all linear layers."""

    method: str = "full"
    rank: int = whole(16, 1)


@dataclass(frozen=True, slots=True)
class PlanCompute:
    """``dtype`` None: float32 to train, the model's own to generate. ``compute_dtype``: a GPU's."""

    dtype: str | None = None
    compute_dtype: str | None = None
    weight_dtype: str | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """What is asked. ``machine`` None: this one, measured."""

    model: str
    task: str = "generate"
    machine: str | None = None
    advice: bool = True
    data: PlanData = field(default_factory=PlanData)
    rows: PlanRows = field(default_factory=PlanRows)
    sampling: PlanSampling = field(default_factory=PlanSampling)
    optimizer: PlanOptimizer = field(default_factory=PlanOptimizer)
    adapters: PlanAdapters = field(default_factory=PlanAdapters)
    compute: PlanCompute = field(default_factory=PlanCompute)
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    @property
    def job(self) -> FineTune:
        """The fine-tuning that is asked about. Raises ValueError for odd settings."""
        from offload.blueprint import FineTune

        told = self.compute
        return FineTune(
            self.adapters.method, self.adapters.rank, told.dtype or "float32", told.compute_dtype,
            told.weight_dtype, self.optimizer.state_dtype,
            (self.data.batch_size or 1) * self.data.accumulate, self.data.seq_len,
            told.gradient_checkpointing, self.optimizer.step_in_backward,
        )  # fmt: skip

    @property
    def work(self) -> Workload:
        """The generation that is asked about."""
        rows = self.rows
        return Workload(rows.prompt_count, rows.prompt_tokens, self.sampling.max_new_tokens)


def build_plan(values: Mapping[str, Any]) -> tuple[PlanConfig, list[str]]:
    """The configuration of flat ``{key path: value}``, as `settings.build`, and what is not
    modelled of what they ask for.

    ``task`` is "finetune" where nobody says it but the values speak of the optimizer or of steps.
    Raises InputError for another task, too.
    """
    elsewhere = {*key_paths(RunConfig), *key_paths(GenerateConfig)} - {*key_paths(PlanConfig)}
    left_out = [key for key in UNMODELLED if values.get(key)]
    trains = any(key.startswith(TRAINS) for key in values)
    told = {key: value for key, value in values.items() if key not in elsewhere}
    config = build(PlanConfig, {"task": "finetune" if trains else "generate"} | told)
    if config.task not in TASKS:
        raise InputError(f"plan: no task {config.task!r}; there are {' and '.join(TASKS)}")
    return config, left_out
