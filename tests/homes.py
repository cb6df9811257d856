"""A home space to try things on: lanes that wait to be told, and a disk on which things happen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.frames import FramePool
from offload.tiers.home import Chunk, HomeSpace
from offload.tiers.lane import Meter, Span, Ticket
from offload.tiers.layout import lay_out
from offload.tiers.spec import KIB

CHUNK = 16 * KIB
ELEMENTS = CHUNK // 4


def all_are(tensor: Tensor, value: float) -> bool:
    return bool((tensor == value).all())


class HeldLane:
    """A lane that does nothing until it is told to, or somebody waits."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.held: list[tuple[Ticket, Callable[[], int]]] = []

    def submit(self, ticket: Ticket, work: Callable[[], int], size_bytes: int) -> None:
        self.held.append((ticket, work))

    def wait(self, ticket: Ticket) -> None:
        for held in [h for h in self.held if h[0] is ticket]:
            self.held.remove(held)
            ticket.run(held[1])
        ticket.wait()

    def between(self, first: int, last: int) -> list[Span]:
        return []

    def run_all(self) -> None:
        """Do everything that is queued."""
        while self.held:
            self.wait(self.held[0][0])

    close = run_all


class SlowDisk(SpillFile):
    """A spill file with something that happens in the middle of the next write."""

    during_write: Callable[[], object] | None = None

    def push(self, address: int, size_bytes: int, offset: int) -> None:
        super().push(address, size_bytes, offset)
        happening, self.during_write = self.during_write, None
        if happening is not None:
            happening()


class Rig:
    """A home space of four chunks, each under a tensor of its own."""

    def __init__(self, disk: SpillFile) -> None:
        self.read, self.write = HeldLane(), HeldLane()
        self.pool = FramePool(poison=True)
        self.disk = disk
        self.space = HomeSpace(disk, self.pool, self.read, self.write)
        self.region = self.space.add_region("weights", lay_out([ELEMENTS] * 4, ELEMENTS), 4)
        self.tensors = [self._tensor(i) for i in range(4)]

    def _tensor(self, i: int) -> Tensor:
        buffer = vm.buffer_at(self.region.address_of(i), CHUNK)
        buffer.mapping = self.region.mapping  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.float32)

    def fill(self, i: int, value: float) -> Chunk:
        """A fresh chunk full of one value, resident and dirty."""
        chunk = self.space.chunks[i]
        self.space.make_fresh(chunk)
        self.tensors[i].fill_(value)
        return chunk

    def save(self, chunk: Chunk) -> None:
        self.space.start_save(chunk)
        self.space.finish_save(chunk)

    def evict(self, chunk: Chunk) -> None:
        self.save(chunk)
        self.space.drop(chunk)

    def load(self, chunk: Chunk) -> None:
        self.space.start_load(chunk)
        self.space.install(chunk)

    def evicted(self, i: int, value: float) -> Chunk:
        chunk = self.fill(i, value)
        self.evict(chunk)
        return chunk

    def during_write(self, happening: Callable[[], object]) -> None:
        """Do something in the middle of the next write."""
        assert isinstance(self.disk, SlowDisk)
        self.disk.during_write = happening
