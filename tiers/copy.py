"""Host <-> device copies: what a lane's worker does, and what compute waits for.

A worker reads a home (CPU memory) and fills a frame, converting on the way. The host side of a
copy is over when the worker returns: only then may the home's pages move. The device side may
come later; compute waits for its event on the stream, not on the host. A copy to the host is over
when its worker returns.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Iterator
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
    """The device side of one copy: what it waits for, what waits for it."""

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

    host_bytes = 0

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
    """Copies through pinned staging buffers, on one stream for each direction, made once.

    Homes cannot be pinned themselves, since their pages move. Conversion is done on the host, so
    narrow types also mean fewer bytes on the wire. Each direction is used by one worker.
    """

    def __init__(self, device: torch.device) -> None:
        self.host_bytes = STAGING_BYTES * STAGING_BUFFERS * 2
        self._device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._to, self._back = _Staging(device), _Staging(device)

    def upload(self, source: Tensor, target: Tensor, mark: Mark) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._up):
            if isinstance(mark.vacant, torch.cuda.Event):
                self._up.wait_event(mark.vacant)
            for part in _parts(target):
                buffer, moved = self._to.next()
                staged = _as(buffer, target[part])
                staged.copy_(source[part])
                target[part].copy_(staged, non_blocking=True)
                moved.record(self._up)
            arrived = torch.cuda.Event()
            arrived.record(self._up)
            mark.arrived = arrived

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
            if isinstance(mark.vacant, torch.cuda.Event):
                self._down.wait_event(mark.vacant)
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


class _Staging:
    """Host buffers of exactly their size, used in turn, registered with CUDA once.

    torch's own pinned allocator would round up to a power of two. Where pages cannot be registered
    copies still work, but slowly and one after the other: that is said.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [vm.reserve(STAGING_BYTES) for _ in range(STAGING_BUFFERS)]
        self._moved = [torch.cuda.Event() for _ in self._buffers]
        self._pinned: list[int] = []
        self._next = 0
        for address in self._buffers:
            vm.want_huge(address, STAGING_BYTES)
            vm.fill(address, STAGING_BYTES, 0)
            self._pin(address)

    @property
    def pinned_bytes(self) -> int:
        """Of the buffers, what CUDA has registered."""
        return len(self._pinned) * STAGING_BYTES

    def next(self) -> tuple[Tensor, torch.cuda.Event]:
        """The buffer whose last copy was queued longest ago, when that is over, and its event."""
        address, moved = self._buffers[self._next], self._moved[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        moved.synchronize()  # never recorded: returns at once
        return torch.frombuffer(vm.buffer_at(address, STAGING_BYTES), dtype=torch.uint8), moved

    def close(self) -> None:
        """Give the memory back; no copy is in flight."""
        with torch.cuda.device(self._device):
            for address in self._pinned:
                code = int(torch.cuda.cudart().cudaHostUnregister(address))
                if code != 0:
                    raise RuntimeError(f"pinned memory could not be released (CUDA error {code})")
        for address in self._buffers:
            vm.release(address, STAGING_BYTES)
        self._buffers.clear()

    def _pin(self, address: int) -> None:
        # The context must be the device's: registering would make one on the current device.
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostRegister(address, STAGING_BYTES, 0))
            if code == 0:
                self._pinned.append(address)
                return
            warnings.warn(
                f"{STAGING_BYTES >> 20} MiB of host memory could not be pinned (CUDA error {code}):"
                " copies to and from the device will be slow; raise the limit of locked memory "
                "(ulimit -l)",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            with contextlib.suppress(RuntimeError):
                # CUDA keeps the error, and the next launch of a kernel would be blamed for it.
                torch.zeros(1, device=self._device)


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
