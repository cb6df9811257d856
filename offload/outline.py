"""Where everything of a run would stand: arithmetic over shapes, nothing is allocated.

Chunk sizes, families and layouts come from the same functions that ``offload.wrap`` calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from offload.activations import find_units
from offload.bind import choose_chunks, family_keys, lay_out_family, mirrors_of
from offload.optim.mirror import OptimizerProfile
from offload.optim.narrow import Narrowing
from offload.quantised import scratch_bytes
from offload.tiers.layout import Layout


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


def outline(
    model: nn.Module, learnt: OptimizerProfile | None, narrowing: Narrowing, host_bytes: int,
    chunk_bytes: int = 0, computed: torch.dtype | None = None,
) -> Outline:  # fmt: skip
    """Where everything would stand under a budget; ``chunk_bytes`` 0: as chosen for it.

    ``computed``: in which type, None: in that of the weights.
    The same families, layouts and chunk numbers that ``offload.wrap`` makes.
    """
    chosen, copies = choose_chunks(host_bytes, learnt, narrowing)
    trained = {p for p in (learnt.params if learnt else ()) if p.requires_grad}
    families: list[Members] = []
    place: dict[str, tuple[int, int]] = {}
    first = 0
    for (dtype, is_trained, _), named in family_keys(model, trained, find_units(model)).items():
        parts = mirrors_of(named, learnt, narrowing)
        numels = [p.numel() for _, p in named]
        layout, mirrors = lay_out_family(numels, dtype, parts, chunk_bytes or chosen, computed)
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
