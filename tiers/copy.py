"""Host <-> device copies: what a lane's worker does, and what compute waits for.

A worker reads a home (CPU memory) and fills a frame, converting on the way. The host side of a
copy is over when the worker returns: only then may the home's pages move. The device side may
come later; compute waits for its event on the stream, not on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from offload.tiers import vm
from offload.tiers.home import Chunk, HomeSpace
from offload.tiers.lane import Lane, Ticket
from offload.tiers.spec import MIB

STAGING_BYTES = 8 * MIB  # per buffer: long enough to reach PCIe's rate, short enough to overlap
STAGING_BUFFERS = 3  # one being filled, one on the wire, one done


@dataclass(slots=True, eq=False)
class Mark:
    """The device side of one chunk's upload: what it waits for, what waits for it."""

    vacant: object | None = None
    arrived: object | None = None


class Copier(Protocol):
    """How bytes get into frames and gradients out of the device."""

    host_bytes: int  # staging memory that the host tier pays for

    def upload(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        """Copy 1-d source [n] (CPU) over target [n] (device), converting. Runs on a worker."""
        ...

    def arrive(self, mark: Mark) -> None:
        """Have what computes next wait for the uploads under this mark."""
        ...

    def drain(self, mark: Mark) -> None:
        """Wait, on the host, until the device side is over too."""
        ...

    def close(self) -> None:
        """Free the staging memory; nothing is in flight."""
        ...


class PlainCopier:
    """Frames in host memory: a copy is a copy."""

    host_bytes = 0

    def upload(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        target.copy_(source)

    def arrive(self, mark: Mark) -> None:
        """The worker's return was the arrival."""

    def drain(self, mark: Mark) -> None:
        """The same."""

    def close(self) -> None:
        """There is no staging memory."""


class CudaCopier:
    """Uploads through pinned staging buffers on one stream that is made once.

    Homes cannot be pinned themselves, since their pages move. Conversion is done while filling
    the staging buffer, so narrow types also mean fewer bytes on the wire. Used by one worker.
    """

    def __init__(self, device: torch.device) -> None:
        self.host_bytes = STAGING_BYTES * STAGING_BUFFERS
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._staging = [_pinned(STAGING_BYTES) for _ in range(STAGING_BUFFERS)]
        self._sent = [torch.cuda.Event() for _ in self._staging]
        self._next = 0

    def upload(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        step = STAGING_BYTES // target.element_size()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if isinstance(mark.vacant, torch.cuda.Event):
                self._stream.wait_event(mark.vacant)
            for start in range(0, target.numel(), step):
                part = target[start : start + step]
                staged = self._stage(source[start : start + step], part)
                part.copy_(staged, non_blocking=True)
                self._sent[self._next].record(self._stream)
                self._next = (self._next + 1) % len(self._staging)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
            mark.arrived = arrived

    def arrive(self, mark: Mark) -> None:
        if isinstance(mark.arrived, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(mark.arrived)

    def drain(self, mark: Mark) -> None:
        if isinstance(mark.arrived, torch.cuda.Event):
            mark.arrived.synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        for buffer in self._staging:
            torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
            vm.release(buffer.data_ptr(), STAGING_BYTES)
        self._staging.clear()

    def _stage(self, source: Tensor, like: Tensor) -> Tensor:
        """The source, converted, in a staging buffer whose last copy has left."""
        self._sent[self._next].synchronize()  # never recorded: returns at once
        buffer = self._staging[self._next][: like.numel() * like.element_size()]
        return buffer.view(like.dtype).copy_(source)


def _pinned(size_bytes: int) -> Tensor:
    """Huge pages of exactly this size, registered with CUDA once; pageable where that fails.

    torch's own pinned allocator would round up to a power of two.
    """
    address = vm.reserve(size_bytes)
    vm.want_huge(address, size_bytes)
    vm.fill(address, size_bytes, 0)
    torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0)
    return torch.frombuffer(vm.buffer_at(address, size_bytes), dtype=torch.uint8)


def deliver(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient as its parameter wants it. Differentiable. Waits for the device.

    Autograd adds it up on the CPU as soon as it is returned, so there is nothing to put off. It
    crosses the bus in the narrow type and is widened on the host.
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
