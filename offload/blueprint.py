"""A fine-tuning run as it would be: the model without data, its optimizer, and where all stands.

Everything here is arithmetic over shapes. The model is built of fake tensors, which behave as CPU
tensors do and hold nothing, so that 405 B parameters take seconds; optimizer, chunk sizes, layouts
and families come from the same functions that ``offload.wrap`` calls.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # there is no public way to it

from offload.activations import find_units
from offload.bind import choose_chunks, family_keys, lay_out_family, mirrors_of
from offload.errors import OffloadError
from offload.lora import add_adapters
from offload.machines import DTYPES
from offload.optim.learn import learn
from offload.quantised import scratch_bytes
from offload.tiers.layout import Layout

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
    mode: FakeTensorMode
    inputs: dict[str, Any]


def draft(config: Any, job: FineTune) -> Draft:
    """The model of a configuration, made ready as the job says. Raises OffloadError."""
    config = copy.deepcopy(config)
    mode = FakeTensorMode()
    with mode:
        model = build(config, job, contents=False)
        ids = torch.zeros(job.batch, job.sequence, dtype=torch.int64)
        inputs = {"input_ids": ids, "labels": ids}
    return Draft(model, mode, inputs)


def build(config: Any, job: FineTune, *, contents: bool = True) -> Any:
    """The model, on whatever device or mode is current, in training mode. Raises OffloadError.

    Without ``contents`` quantised weights have no codes.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    both = getattr(config, "is_encoder_decoder", False)
    if both and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0  # what shifts the labels; its value changes no shape
    kind = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
    try:
        model = kind.from_config(config, dtype=getattr(torch, job.dtype))
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


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of bytes of a family: weights, gradients or a state. Chunk i is ``first + i``."""

    name: str
    layout: Layout
    itemsize: int
    first: int

    @property
    def payload_bytes(self) -> int:
        """Of the tensors' elements."""
        return sum(self.layout.numels) * self.itemsize

    @property
    def placed_bytes(self) -> int:
        """Of the run that is cut into chunks, alignment and whole pages included."""
        return self.layout.total_elements * self.itemsize

    def chunk_bytes(self) -> Iterator[int]:
        """Of each chunk."""
        for c in range(self.layout.chunks):
            start, stop = self.layout.chunk_range(c)
            yield (stop - start) * self.itemsize


@dataclass(frozen=True, slots=True)
class Members:
    """Parameters of one dtype, all trained or all frozen: as `offload.bind.Family`."""

    names: tuple[str, ...]
    trained: bool
    weights: Kind
    grads: Kind | None
    states: tuple[Kind, ...]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """All, in the order of their chunks."""
        return (self.weights, *([self.grads] if self.grads else []), *self.states)


@dataclass(frozen=True, slots=True)
class Outline:
    """Where everything of a run would stand. ``fixed_bytes``: buffers and what layers widen in."""

    families: tuple[Members, ...]
    chunk_bytes: int
    copies: int
    fixed_bytes: int
    place: dict[str, tuple[int, int]] = field(compare=False)  # parameter -> family, index

    def sizes(self) -> tuple[int, ...]:
        """Bytes of every chunk, by its id."""
        return tuple(b for f in self.families for kind in f.kinds for b in kind.chunk_bytes())

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """(bytes of elements, bytes with padding) of weights, gradients and optimizer state."""
        found = {"weights": (0, 0), "gradients": (0, 0), "optimizer": (0, 0)}
        for family in self.families:
            for kind in family.kinds:
                name = kind.name if kind.name in found else "optimizer"
                a, b = found[name]
                found[name] = a + kind.payload_bytes, b + kind.placed_bytes
        return found

    @property
    def total_bytes(self) -> int:
        """Of all chunks."""
        return sum(placed for _, placed in self.by_kind().values())


def outline(model: nn.Module, job: FineTune, host_bytes: int, chunk_bytes: int = 0) -> Outline:
    """Where everything would stand under a budget; ``chunk_bytes`` 0: as chosen for it.

    The same families, layouts and chunk numbers that ``offload.wrap`` makes.
    """
    learnt, narrowing = learn(optimizer_of(model), job.state_dtype)
    chosen, copies = choose_chunks(host_bytes, learnt, narrowing)
    trained = {p for p in (learnt.params if learnt else ()) if p.requires_grad}
    families: list[Members] = []
    place: dict[str, tuple[int, int]] = {}
    first = 0
    for (dtype, is_trained, _), named in family_keys(model, trained, find_units(model)).items():
        parts = mirrors_of(named, learnt, narrowing)
        numels = [p.numel() for _, p in named]
        layout, mirrors = lay_out_family(numels, dtype.itemsize, parts, chunk_bytes or chosen)
        kinds = [("weights", layout, dtype.itemsize)]
        if is_trained:
            kinds.append(("gradients", layout, dtype.itemsize))
            kinds += [(n, mirrors[n], parts[n].dtype.itemsize) for n in parts]
        made = []
        for name, mirror, itemsize in kinds:
            made.append(Kind(name, mirror, itemsize, first))
            first += mirror.chunks
        for i, (name, _) in enumerate(named):
            place[name] = len(families), i
        grads, states = (made[1], tuple(made[2:])) if is_trained else (None, ())
        names = tuple(n for n, _ in named)
        families.append(Members(names, is_trained, made[0], grads, states))
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    fixed = buffers + scratch_bytes(model)
    return Outline(tuple(families), chunk_bytes or chosen, copies, fixed, place)
