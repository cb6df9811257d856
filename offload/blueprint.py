"""A fine-tuning run as it would be: the model without data, its optimizer, and where all stands.

Everything here is arithmetic over shapes. The model is built of fake tensors, which behave as CPU
tensors do and hold nothing, so that 405 B parameters take seconds; optimizer, chunk sizes, layouts
and families come from the same functions that ``offload.wrap`` calls.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.errors import OffloadError
from offload.internals import fake_mode
from offload.lora import add_adapters
from offload.machines import DTYPES
from offload.modelclass import auto_class
from offload.optim.learn import learn
from offload.outline import Outline, outline

METHODS = ("full", "lora")


@dataclass(frozen=True, slots=True)
class FineTune:
    """What is to be run: one step is ``batch`` sequences of ``sequence`` tokens.

    ``method``: "full", or "lora" with adapters of ``rank``. ``dtype``: of the weights.
    ``compute_dtype``: of the copies that a GPU computes with, None: the weights' own.
    ``recompute``: the model's own gradient checkpointing. Raises ValueError for odd settings.
    """

    method: str = "full"
    rank: int = 16
    dtype: str = "float32"
    compute_dtype: str | None = None
    weight_dtype: str | None = None
    state_dtype: str | None = None
    batch: int = 1
    sequence: int = 512
    recompute: bool = False
    in_backward: bool = False

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                options = " or ".join(known)
                raise ValueError(f"{name} must be {options}, not {getattr(self, name)!r}")
        for name, least in (("batch", 1), ("sequence", 2), ("rank", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.weight_dtype is not None and self.method == "full":
            raise ValueError(
                f"weight_dtype={self.weight_dtype!r} is for frozen weights: give method lora"
            )

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.sequence


@dataclass(slots=True, eq=False)
class Draft:
    """A model without data. ``mode``: the one that its tensors belong to."""

    model: Any
    mode: Any
    inputs: dict[str, Any]


def draft(config: Any, job: FineTune) -> Draft:
    """The model of a configuration, made ready as the job says. Raises OffloadError."""
    config = copy.deepcopy(config)
    mode = fake_mode()
    with mode:
        model = build(config, job, contents=False)
        ids = torch.zeros(job.batch, job.sequence, dtype=torch.int64)
        inputs = {"input_ids": ids, "labels": ids}
    return Draft(model, mode, inputs)


def build(config: Any, job: FineTune, *, contents: bool = True) -> Any:
    """The model, on whatever device or mode is current, in training mode. Raises OffloadError.

    Without ``contents`` quantised weights have no codes.
    """
    both = getattr(config, "is_encoder_decoder", False)
    if both and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # what shifts the labels; its value changes no shape
    try:
        model = auto_class(config).from_config(config, dtype=getattr(torch, job.dtype))
    except ValueError as error:
        raise OffloadError(f"plan: neither a causal nor a seq2seq model: {error}") from error
    if job.weight_dtype is not None:
        _quantise(model, job.weight_dtype, contents=contents)
    if job.method == "lora":
        add_adapters(model, job.rank)
    if job.recompute:
        _recompute(model)
    return model.train()


def _recompute(model: Any) -> None:
    told = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        model.activation_checkpointing_enable(told)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=told)


def _quantise(model: Any, weight_dtype: str, *, contents: bool) -> None:
    from offload.groupwise import format_of
    from offload.quantised import quantise

    form = format_of(weight_dtype)
    assert form is not None
    quantise(
        model, form, None, lambda s: torch.empty(s, dtype=torch.uint8), lambda _: None,
        contents=contents,
    )  # fmt: skip


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW over what is trained, as ``offload finetune`` makes it."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def outline_of(model: nn.Module, job: FineTune, host_bytes: int, chunk_bytes: int = 0) -> Outline:
    """Where everything of a job would stand; see `offload.outline.outline`."""
    learnt, narrowing = learn(optimizer_of(model), job.state_dtype)
    computed = getattr(torch, job.compute_dtype) if job.compute_dtype else None
    return outline(model, learnt, narrowing, host_bytes, chunk_bytes, computed)
