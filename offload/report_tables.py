"""What stands where: the chunks of a run and the modules that own them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from offload.bind import Family
from offload.parts import Parts
from offload.tiers.home import Region
from offload.tiers.layout import Layout

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
NAMED_TENSORS = 6  # of a chunk; there may be hundreds of small ones in it


@dataclass(slots=True)
class ChunkRow:
    """One chunk: what of it belongs to which module (index), in bytes."""

    size_bytes: int
    kind: str = ""
    on_disk: bool = False  # has room in the spill file; else it is in memory for good
    tensors: list[str] = field(default_factory=list)
    owners: Counter[int] = field(default_factory=Counter)

    @property
    def module(self) -> int:
        """The module that owns most of it; -1: none."""
        return max(self.owners, key=lambda m: (self.owners[m], -m), default=-1)


class Tables:
    """Chunks by id and modules by index, of one run."""

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self.modules = [n for n, m in model.named_modules() if next(_own(m), None) is not None]
        self.index = {name: i for i, name in enumerate(self.modules)}
        chunks = parts.engine.space.chunks
        self.chunks = [ChunkRow(c.size_bytes, on_disk=c.offset >= 0) for c in chunks]
        for family in parts.binding.families:
            for kind, region in _regions(family):
                self._add(family, kind, region)
        self.weight_bytes = Counter[int]()
        for home in parts.binding.homes.values():
            self.weight_bytes[self.module_of(home.name)] += home.size_bytes

    def module_of(self, parameter: str) -> int:
        """The index of the module that has a parameter of this name; -1: none has."""
        return self.index.get(parameter.rpartition(".")[0], -1)

    def users(self, chunks: Iterable[int]) -> Counter[int]:
        """Bytes of each module in these chunks."""
        total: Counter[int] = Counter()
        for chunk in chunks:
            if chunk >= 0:
                total.update(self.chunks[chunk].owners)
        return total

    def split(self, chunk: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """A chunk's bytes by module, in proportion: (module, bytes), in all ``size_bytes``."""
        owners = self.chunks[chunk].owners if chunk >= 0 else Counter[int]()
        whole_bytes, left_bytes = sum(owners.values()), size_bytes
        for module, own_bytes in owners.most_common():
            share_bytes = size_bytes * own_bytes // whole_bytes
            left_bytes -= share_bytes
            yield module, share_bytes
        if left_bytes:  # alignment, rounding, and what is nobody's
            yield (self.chunks[chunk].module if chunk >= 0 else -1), left_bytes

    def home_bytes(self, homes: list[str]) -> dict[int, dict[str, int]]:
        """Bytes of each module by the tier where they live between uses."""
        found: defaultdict[int, Counter[str]] = defaultdict(Counter)
        for row, home in zip(self.chunks, homes, strict=True):
            for module, size_bytes in row.owners.items():
                found[module][home] += size_bytes
        return {module: dict(tiers) for module, tiers in found.items()}

    def _add(self, family: Family, kind: str, region: Region) -> None:
        layout: Layout = region.layout
        for c in range(layout.chunks):
            row = self.chunks[region.chunk_ids[c]]
            row.kind = kind
            pieces = layout.pieces(c)
            row.tensors = [family.names[p.tensor] for p in pieces[:NAMED_TENSORS]]
            if len(pieces) > NAMED_TENSORS:
                row.tensors.append(f"and {len(pieces) - NAMED_TENSORS} more")
            for p in pieces:
                module = self.module_of(family.names[p.tensor])
                row.owners[module] += (p.stop - p.start) * region.itemsize

    def to_dict(self, homes: list[str]) -> dict[str, Any]:
        """The schema's ``chunks``."""
        return {
            "bytes": [row.size_bytes for row in self.chunks],
            "kind": [row.kind for row in self.chunks],
            "home": homes,
            "tensors": [row.tensors for row in self.chunks],
        }


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return iter(module.parameters(recurse=False))


def _regions(family: Family) -> Iterator[tuple[str, Region]]:
    yield WEIGHTS, family.weights
    if family.grads is not None:
        yield GRADIENTS, family.grads
    for region in family.states.values():
        yield OPTIMIZER, region
