"""The configuration of one ``offload generate``; keys that `RunConfig` has too mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from offload.prefetch.attention import CHOICES
from offload.runconfig import DTYPES, MemoryConfig
from offload.settings import InputError, absolute_model, build, real, whole


@dataclass(frozen=True, slots=True)
class PromptsConfig:
    """What is read, and how many rows go through the model at once. None: as many as fit."""

    prompts: str
    with_prompt: bool = False
    batch_size: int | None = field(default=None, metadata={"least": 1})
    micro_batches: int | None = field(default=None, metadata={"least": 1})


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How tokens are chosen, and when a row ends: see ``offload.sampling``."""

    max_new_tokens: int = whole(128, 1)
    temperature: float = real(0.0, 0.0)
    top_p: float = real(1.0, 0.0)
    top_k: int = whole(0, 0)
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GenerateCompute:
    """How the numbers are made. ``dtype`` None: the checkpoint's own."""

    dtype: str | None = None
    seed: int = whole(0, 0)


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Keys and values in tiers: see ``Runtime.generate``. None: whole, in memory.

    ``attention``: to those on the host, with a GPU: "auto", "host" or "device".
    """

    kv_memory: int | str | None = None
    kv_dtype: str | None = None
    attention: str = "auto"


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """What to generate, and where it goes."""

    model: str
    output: str
    data: PromptsConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    compute: GenerateCompute = field(default_factory=GenerateCompute)
    cache: CacheConfig = field(default_factory=CacheConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)


def build_generate(values: Mapping[str, Any]) -> GenerateConfig:
    """The configuration of flat ``{key path: value}``, as `settings.build`.

    Raises InputError for values that do not go together, too.
    """
    config = build(GenerateConfig, values)
    if config.compute.dtype not in (None, *DTYPES):
        options = ", ".join(DTYPES)
        raise InputError(f"compute.dtype must be one of {options}, not {config.compute.dtype!r}")
    if config.cache.attention not in CHOICES:
        options = ", ".join(CHOICES)
        raise InputError(f"cache.attention must be one of {options}, not {config.cache.attention}")
    if config.data.micro_batches is not None and config.data.batch_size is None:
        raise InputError("data.micro_batches needs data.batch_size: give --batch-size")
    config.memory.check()
    return replace(
        config, model=absolute_model(config.model), memory=config.memory.absolute()
    )  # fmt: skip
