"""Host <-> device copies: what a lane's worker does, and what compute waits for.

A worker reads a home (CPU memory) and fills a frame, converting on the way. The host side of a
copy is over when the worker returns: only then may the home's pages move. The device side may
come later; compute waits for its event on the stream, not on the host. A copy to the host is over
when its worker returns, and so is one straight from a pinned home: that is read by the device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from offload.tiers import vm
from offload.tiers.home import Chunk, HomeSpace, Region
from offload.tiers.lane import Lane, Ticket
from offload.tiers.pinned import Pinned
from offload.tiers.spec import MIB

STAGING_BYTES = 8 * MIB  # per buffer: long enough to reach PCIe's rate, short enough to overlap
STAGING_BUFFERS = 3  # one being filled, one on the wire, one done


@dataclass(slots=True, eq=False)
class Mark:
    """The device side of one copy: what it waits for, what waits for it."""

    vacant: object | None = None
    arrived: object | None = None


class Copier(Protocol):
    """How bytes get into frames and gradients out of the device."""

    host_bytes: int  # staging memory that the host tier pays for

    @property
    def pinned_bytes(self) -> int:
        """Host memory that the device reads and writes by itself, homes included."""
        ...

    def pin(self, regions: Iterable[Region]) -> bool:
        """Homes that never move: whether copies go straight from there and to there."""
        ...

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether this is memory of theirs."""
        ...

    def upload(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        """Copy 1-d source [n] (CPU) over target [n] (device), converting. Runs on a worker."""
        ...

    def arrive(self, mark: Mark) -> None:
        """Have what computes next wait for the uploads under this mark."""
        ...

    def drain(self, mark: Mark) -> None:
        """Wait, on the host, until the device side is over too."""
        ...

    def ready(self) -> Mark:
        """For a copy to the host of what this thread has queued until now."""
        ...

    def download(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        """Copy 1-d source [n] (device) over target [n] (CPU), converting. Runs on a worker."""
        ...

    def close(self) -> None:
        """Free the staging memory; nothing is in flight."""
        ...


class PlainCopier:
    """Frames in host memory: a copy is a copy."""

    host_bytes = pinned_bytes = 0

    def pin(self, regions: Iterable[Region]) -> bool:
        return False

    def is_pinned(self, tensor: Tensor) -> bool:
        return False

    def upload(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        target.copy_(source)

    def arrive(self, mark: Mark) -> None:
        """The worker's return was the arrival."""

    def drain(self, mark: Mark) -> None:
        """The same."""

    def ready(self) -> Mark:
        return Mark()

    def download(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        target.copy_(source)

    def close(self) -> None:
        """There is no staging memory."""


class CudaCopier:
    """Copies on one stream for each direction, made once, through pinned staging buffers.

    Homes are pinned themselves where they never move: then what is not converted goes straight.
    Conversion is done on the host, so narrow types also mean fewer bytes on the wire. Up go two
    workers, so that a copy is queued while one is on the wire; down goes one.
    """

    def __init__(self, device: torch.device) -> None:
        self.host_bytes = STAGING_BYTES * STAGING_BUFFERS * 2
        self._device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._to, self._back = _Staging(device), _Staging(device)
        self._homes = Pinned(device)
        self._staging = threading.Lock()  # of uploads: buffers are used in turn

    @property
    def pinned_bytes(self) -> int:
        return sum(p.size_bytes for p in (self._to.pinned, self._back.pinned, self._homes))

    def pin(self, regions: Iterable[Region]) -> bool:
        """All of them or, where one cannot be pinned, none."""
        for region in regions:
            size_bytes = region.layout.total_elements * region.itemsize
            if not self._homes.add(region.address, size_bytes, region.mapping):
                self._homes.close()
                return False
        return True

    def is_pinned(self, tensor: Tensor) -> bool:
        return self._homes.holds(tensor)

    def upload(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._up):
            if source.dtype == target.dtype and self.is_pinned(source):
                self._await_room(self._up, mark)
                target.copy_(source, non_blocking=True)
                # The home may be written to when this returns.
                self._arrived(mark).synchronize()
                return
            with self._staging:
                self._await_room(self._up, mark)
                for part in _parts(target):
                    buffer, moved = self._to.next()
                    staged = _as(buffer, target[part])
                    staged.copy_(source[part])
                    target[part].copy_(staged, non_blocking=True)
                    moved.record(self._up)
                self._arrived(mark)

    def _arrived(self, mark: Mark) -> torch.cuda.Event:
        arrived = torch.cuda.Event()
        arrived.record(self._up)
        mark.arrived = arrived
        return arrived

    @staticmethod
    def _await_room(stream: torch.cuda.Stream, mark: Mark) -> None:
        """Have a copy wait for what computes: with the frame, or on the gradient."""
        if isinstance(mark.vacant, torch.cuda.Event):
            stream.wait_event(mark.vacant)

    def arrive(self, mark: Mark) -> None:
        if isinstance(mark.arrived, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(mark.arrived)

    def drain(self, mark: Mark) -> None:
        if isinstance(mark.arrived, torch.cuda.Event):
            mark.arrived.synchronize()

    def ready(self) -> Mark:
        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(self._device))
        return Mark(vacant=queued)

    def download(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        leaving: deque[tuple[slice, Tensor, torch.cuda.Event]] = deque()

        def take_out() -> None:
            part, staged, moved = leaving.popleft()
            moved.synchronize()
            target[part].copy_(staged)

        with torch.cuda.device(self._device), torch.cuda.stream(self._down):
            self._await_room(self._down, mark)
            if source.dtype == target.dtype and self.is_pinned(target):
                target.copy_(source, non_blocking=True)
                moved = torch.cuda.Event()
                moved.record(self._down)
                moved.synchronize()
                return
            for part in _parts(source):
                if len(leaving) == STAGING_BUFFERS:
                    take_out()
                buffer, moved = self._back.next()
                staged = _as(buffer, source[part])
                staged.copy_(source[part], non_blocking=True)
                moved.record(self._down)
                leaving.append((part, staged, moved))
            while leaving:
                take_out()

    def close(self) -> None:
        for stream, staging in ((self._up, self._to), (self._down, self._back)):
            stream.synchronize()
            staging.close()
        self._homes.close()


class _Staging:
    """Host buffers of exactly their size, used in turn, registered with CUDA once.

    Where pages cannot be registered copies still work, but slowly and one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.pinned = Pinned(device)
        self._buffers = [vm.reserve(STAGING_BYTES) for _ in range(STAGING_BUFFERS)]
        self._moved = [torch.cuda.Event() for _ in self._buffers]
        self._next = 0
        for address in self._buffers:
            vm.want_huge(address, STAGING_BYTES)
            vm.fill(address, STAGING_BYTES, 0)
            self.pinned.add(address, STAGING_BYTES)

    def next(self) -> tuple[Tensor, torch.cuda.Event]:
        """The buffer whose last copy was queued longest ago, when that is over, and its event."""
        address, moved = self._buffers[self._next], self._moved[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        moved.synchronize()  # never recorded: returns at once
        return torch.frombuffer(vm.buffer_at(address, STAGING_BYTES), dtype=torch.uint8), moved

    def close(self) -> None:
        """Give the memory back; no copy is in flight."""
        self.pinned.close()
        for address in self._buffers:
            vm.release(address, STAGING_BYTES)
        self._buffers.clear()


def _parts(flat: Tensor) -> Iterator[slice]:
    """A 1-d tensor in parts that fit a staging buffer."""
    step = STAGING_BYTES // flat.element_size()
    return (slice(a, min(a + step, flat.numel())) for a in range(0, flat.numel(), step))


def _as(buffer: Tensor, like: Tensor) -> Tensor:
    """The beginning of a buffer as a tensor of the same type and length."""
    return buffer[: like.numel() * like.element_size()].view(like.dtype)


def deliver(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient as its parameter wants it. Differentiable. Waits for the device.

    It crosses the bus in the narrow type and is widened on the host.
    """
    return grad.to(param.device).to(param.dtype)


@dataclass(slots=True, eq=False)
class Upload:
    """The transfers that fill one frame, in the order of submission."""

    mark: Mark
    tickets: list[Ticket] = field(default_factory=list)


class LendingHomes(HomeSpace):
    """Homes that copies read from: a chunk's pages stay until those copies have been made."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._readers: dict[int, list[tuple[Lane, Ticket]]] = {}

    def lend(self, chunk: Chunk, lane: Lane, ticket: Ticket) -> None:
        """A copy from this chunk's home, which is resident, is about to be submitted."""
        readers = [r for r in self._readers.get(chunk.id, []) if not r[1].done]
        self._readers[chunk.id] = [*readers, (lane, ticket)]

    def drop(self, chunk: Chunk, *, dead: bool = False) -> None:
        for lane, ticket in self._readers.pop(chunk.id, []):
            lane.wait(ticket)
        super().drop(chunk, dead=dead)
