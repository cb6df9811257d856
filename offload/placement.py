"""Where everything of a run would stand, told from shapes alone: for ``--dry-run``.

The model is built without data. Chunk sizes, layouts and refusals come from the functions that
``offload.wrap`` calls, so what is refused here would be refused there, in the same words. What
activations take is not known before a step has run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from offload.config import Given, understand
from offload.errors import SpillError
from offload.heap import FREE_KEPT_BYTES, kept_bytes_for
from offload.modelclass import auto_class
from offload.optim.learn import learn
from offload.optim.mirror import OptimizerProfile
from offload.optim.narrow import Narrowing
from offload.outline import Outline, outline
from offload.room import refuse_without_room, too_small
from offload.runconfig import MemoryConfig
from offload.tiers.spec import format_size
from offload.writable import nearest


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of state: ``payload_bytes`` of elements, ``placed_bytes`` with what chunks pad.

    ``chunk_bytes``: of the largest chunk.
    """

    name: str
    payload_bytes: int = 0
    placed_bytes: int = 0
    chunks: int = 0
    chunk_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """``host_bytes``: the budget; ``fixed_bytes``: of it, what is no chunk and never moves.

    ``disk``: None, or the folder whose spill file has room for all chunks.
    """

    parts: tuple[Part, ...]
    host_bytes: int
    fixed_bytes: int
    disk: str | None

    @property
    def total_bytes(self) -> int:
        """Of all chunks."""
        return sum(part.placed_bytes for part in self.parts)

    @property
    def chunk_bytes(self) -> int:
        """Of the largest chunk."""
        return max((part.chunk_bytes for part in self.parts), default=0)

    @property
    def most_host_bytes(self) -> int:
        """Of chunks that memory holds at once, if activations took nothing."""
        return min(self.total_bytes, max(self.host_bytes - self.fixed_bytes, 0))

    @property
    def least_disk_bytes(self) -> int:
        """Of chunks that are on disk alone, at any time."""
        return self.total_bytes - self.most_host_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {
            "chunk_bytes": self.chunk_bytes,
            "spill_bytes": self.total_bytes if self.disk else 0,
            "most_host_bytes": self.most_host_bytes,
            "least_disk_bytes": self.least_disk_bytes,
        }

    def lines(self) -> Iterator[str]:
        """The same for people."""
        yield f"{'':18}{'bytes':>12}{'in chunks':>14}{'chunks':>8}"
        for part in self.parts:
            yield (
                f"{part.name:18}{format_size(part.payload_bytes):>12}"
                f"{format_size(part.placed_bytes):>14}{part.chunks:>8,}"
            )
        yield (
            f"chunks of at most {format_size(self.chunk_bytes)}, "
            f"{format_size(self.total_bytes)} in all"
        )
        yield (
            f"host: budget {format_size(self.host_bytes)}, {format_size(self.fixed_bytes)} of it "
            f"fixed; at most {format_size(self.most_host_bytes)} of chunks, less what "
            "activations take (known after the first step)"
        )
        if self.disk is None:
            yield "disk: not used"
            return
        yield (
            f"disk: a spill file of {format_size(self.total_bytes)} in {self.disk}; at least "
            f"{format_size(self.least_disk_bytes)} are there alone"
        )


def empty_model(model_config: Any, dtype: torch.dtype | None) -> nn.Module:
    """A text model of this configuration without data. ``dtype`` None: the configuration's."""
    dtype = dtype or getattr(model_config.get_text_config(), "dtype", None) or torch.float32
    with torch.device("meta"):
        model: nn.Module = auto_class(model_config).from_config(model_config, dtype=dtype)
    return model


def place(
    model: nn.Module,
    memory: MemoryConfig,
    optimizer: Optimizer | None = None,
    state_dtype: str | None = None,
) -> Placement:
    """Where a model without data, and what its optimizer keeps, would stand within these budgets.

    Raises BudgetError and SpillError for budgets that ``offload.wrap`` would refuse.
    """
    given = understand(memory.host_memory, memory.disk, memory.disk_memory, memory.device_memory)
    host_bytes = given.budget.host_bytes
    learnt, narrowing = learn(optimizer, state_dtype)
    where = outline(model, learnt, narrowing, host_bytes)
    sizes = ((p.numel() * p.element_size(), n) for n, p in model.named_parameters())
    refuse_without_room(sizes, given, where.chunk_bytes, where.copies)
    fixed_bytes = where.fixed_bytes + _loose_state_bytes(learnt, narrowing)
    least_bytes = fixed_bytes + (0 if given.disk else where.total_bytes)
    if host_bytes < least_bytes:
        raise too_small(given, least_bytes, "weights, gradients and optimizer state")
    _check_disk(given, where.total_bytes)
    if given.disk:
        fixed_bytes += kept_bytes_for(host_bytes) - FREE_KEPT_BYTES
    disk = str(given.disk) if given.disk else None
    return Placement(_parts(where), host_bytes, fixed_bytes, disk)


def _parts(where: Outline) -> tuple[Part, ...]:
    found: dict[str, Part] = {}
    for kind in (kind for family in where.families for kind in family.kinds):
        name = kind.name if kind.name in ("weights", "gradients") else "optimizer state"
        old = found.get(name, Part(name))
        found[name] = Part(
            name, old.payload_bytes + kind.payload_bytes, old.placed_bytes + kind.placed_bytes,
            old.chunks + kind.layout.chunks, max(old.chunk_bytes, *kind.chunk_bytes()),
        )  # fmt: skip
    return tuple(found.values())


def _loose_state_bytes(learnt: OptimizerProfile | None, narrowing: Narrowing) -> int:
    """Optimizer state that mirrors no weights: counters, factored moments."""
    return sum(
        tensor.size_bytes
        for param, what in (learnt.params.items() if learnt else ())
        for tensor in what.state
        if tensor.name not in narrowing.of(param) and tensor.shape != tuple(param.shape)
    )


def _check_disk(given: Given, spill_bytes: int) -> None:
    if given.disk is None:
        return
    limit_bytes = given.budget.disk_bytes
    if limit_bytes is not None and spill_bytes > limit_bytes:
        raise SpillError(
            f"disk_memory is {format_size(limit_bytes)} but the spill file needs "
            f"{format_size(spill_bytes)}"
        )
    free_bytes = psutil.disk_usage(str(nearest(Path(given.disk)))).free
    if spill_bytes > free_bytes:
        raise SpillError(
            f"{given.disk} has {format_size(free_bytes)} free but the spill file needs "
            f"{format_size(spill_bytes)}; choose another disk=... folder or a larger host_memory"
        )
