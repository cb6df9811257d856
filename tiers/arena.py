"""The device arena: frames cut from device memory, lent to tensors and taken back by ownership.

[Note: who owns a frame]
On the device a chunk comes back at another address, so a view of a frame is right only while the
frame still holds that chunk. Autograd keeps such views where no hook sees them (recomputation in
gradient checkpointing), and so may the user. Therefore every access makes a storage of its own
over the frame, whose buffer object carries a token, and torch keeps the buffer alive as long as
any view of that storage lives. A frame that was given back stays out of reach until its last
token is gone; no rule about modules or units is needed.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from typing import Any, Protocol

import torch
from torch import Tensor

from offload.tiers import vm
from offload.tiers.checksum import checksum_of
from offload.tiers.frames import POISON_BYTE, Frame, FramePool
from offload.tiers.layout import allocated_bytes


class _Token:
    """Dies with the last tensor over one lease."""

    __slots__ = ("__weakref__",)


class Memory(Protocol):
    """Where frames are cut from. All methods run on the thread that owns the engine."""

    device: torch.device

    def held_bytes(self, size_bytes: int) -> int:
        """What a buffer with room for so much takes up: frames are made of this size."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Address of a new buffer of exactly this size. Raises MemoryError where there is none."""
        ...

    def free(self, address: int, size_bytes: int) -> None:
        """Give a buffer back."""
        ...

    def over(self, address: int, size_bytes: int, token: object) -> Tensor:
        """A uint8 tensor [size_bytes] over a buffer, with a storage that keeps ``token``."""
        ...

    def retire(self, address: int) -> None:
        """Compute queued until now may still read the buffer; whatever comes next must wait."""
        ...

    def vacant(self, address: int) -> object | None:
        """What a copy into the buffer must wait for: a CUDA event, or None."""
        ...

    def checksum(self, frame: Frame) -> int:
        """A number that tells whether the contents changed; after what compute has queued."""
        ...

    def poison(self, frame: Frame) -> None:
        """Fill a frame with NaN, after what compute has queued (for tests)."""
        ...

    def follow(self) -> None:
        """A pass begins: what it computes is queued where this thread computes now."""
        ...

    def wait(self) -> None:
        """Wait, on the host, until everything that compute has queued is over."""
        ...


class PageMemory:
    """The emulated device, and the CPU's own converted copies: huge pages of host memory."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def held_bytes(self, size_bytes: int) -> int:
        return size_bytes

    def allocate(self, size_bytes: int) -> int:
        address = vm.reserve(size_bytes)
        vm.want_huge(address, size_bytes)
        vm.fill(address, size_bytes, 0)
        return address

    def free(self, address: int, size_bytes: int) -> None:
        vm.release(address, size_bytes)

    def over(self, address: int, size_bytes: int, token: object) -> Tensor:
        buffer = vm.buffer_at(address, size_bytes)
        buffer.token = token  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=torch.uint8)

    def retire(self, address: int) -> None:
        """Compute on the CPU is over when it returns."""

    def vacant(self, address: int) -> None:
        return None

    def checksum(self, frame: Frame) -> int:
        return checksum_of(frame.address, frame.size_bytes)

    def poison(self, frame: Frame) -> None:
        vm.fill(frame.address, frame.size_bytes, POISON_BYTE)

    def follow(self) -> None:
        """Compute on the CPU is over when it returns."""

    def wait(self) -> None:
        """The same."""


class _CudaBuffer:
    """What ``torch.as_tensor`` needs to make a storage over device memory, without a copy."""

    __slots__ = ("__cuda_array_interface__", "__weakref__", "token")

    def __init__(self, address: int, size_bytes: int, token: object) -> None:
        self.token = token
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
            "stream": None,  # ordering is by our own events
        }


class CudaMemory:
    """Frames from torch's allocator, so that one cap and one set of statistics cover everything.

    ``retire`` records an event on the stream that computes; a copy into the frame waits for it
    on the copy stream, never on the host. That stream is the one which was current when the pass
    began: autograd runs backward nodes there, but our own code may run on a thread on which
    another is current. A freed buffer goes back to the allocator on the stream it was allocated
    on: what that stream runs next may reuse it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.current_stream(device)
        self._buffers: dict[int, tuple[Tensor, torch.cuda.Stream]] = {}
        self._events: dict[int, torch.cuda.Event] = {}

    def held_bytes(self, size_bytes: int) -> int:
        return allocated_bytes(size_bytes)  # so sizes are fewer, too

    def allocate(self, size_bytes: int) -> int:
        try:
            with torch.cuda.stream(self._stream):
                buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        address = buffer.data_ptr()
        self._buffers[address] = buffer, self._stream
        self._events[address] = torch.cuda.Event()
        self.retire(address)  # the allocator may hand out what queued kernels still read
        return address

    def free(self, address: int, size_bytes: int) -> None:
        buffer, stream = self._buffers.pop(address)
        if stream != self._stream:  # computed with on another than the allocator knows of
            buffer.record_stream(self._stream)
        del self._events[address]

    def over(self, address: int, size_bytes: int, token: object) -> Tensor:
        buffer: Any = _CudaBuffer(address, size_bytes, token)
        return torch.as_tensor(buffer, device=self.device)

    def retire(self, address: int) -> None:
        self._events[address].record(self._stream)

    def vacant(self, address: int) -> torch.cuda.Event:
        return self._events[address]

    def checksum(self, frame: Frame) -> int:
        buffer, _ = self._buffers[frame.address]
        with torch.cuda.stream(self._stream):
            values = buffer[: frame.size_bytes // 4 * 4].view(torch.int32)
            return int(values.sum(dtype=torch.int64))

    def poison(self, frame: Frame) -> None:
        with torch.cuda.stream(self._stream), torch.inference_mode(False):
            self.over(frame.address, frame.size_bytes, None).fill_(POISON_BYTE)

    def follow(self) -> None:
        now = torch.cuda.current_stream(self.device)
        if now != self._stream:
            now.wait_stream(self._stream)  # frames and their contents were the other's
            self._stream = now

    def wait(self) -> None:
        self._stream.synchronize()


class DeviceArena(FramePool):
    """A frame pool over device memory whose frames are lent out as tensors.

    Idle frames are used oldest first, so that a chunk hardly ever comes back where it was: a
    stale view cannot be right by chance. ``total_bytes`` includes frames that were given back
    but are still viewed; those are not idle.
    """

    def __init__(self, memory: Memory, *, poison: bool = False) -> None:
        super().__init__(poison=poison)
        self.memory = memory
        self._owners: dict[int, int] = {}  # address of a used frame -> who uses it
        self._views: Counter[int] = Counter()  # address -> leases alive
        self._ended: deque[int] = deque()  # appended to by finalizers, on any thread
        self._waiting: dict[int, Frame] = {}  # given back, still viewed
        self._closed = False

    def take(self, size_bytes: int) -> Frame:
        """An idle frame of exactly this size, or a new one."""
        self.collect()
        idle = self._idle[size_bytes]
        if idle:
            self.idle_bytes -= size_bytes
            return idle.pop(0)
        frame = Frame(self._allocate(size_bytes), size_bytes)
        self.total_bytes += size_bytes
        return frame

    def _allocate(self, size_bytes: int) -> int:
        try:
            return self.memory.allocate(size_bytes)
        except MemoryError:
            self.trim()  # what others took of the device, or its holes: idle frames make up for it
            return self.memory.allocate(size_bytes)

    def give(self, frame: Frame) -> None:
        """Take a frame back: idle at once, or when the last view of it has died."""
        self.collect()
        if self._views[frame.address]:
            self._waiting[frame.address] = frame
        else:
            self._rest(frame)

    def assign(self, frame: Frame, owner: int) -> None:
        """Note who uses a frame, so that a tensor found in it can be told apart."""
        self._owners[frame.address] = owner
        if self.seen is not None:
            self.seen(owner, frame.size_bytes)

    def owners(self) -> list[int]:
        """Who uses each frame that is not idle, those that are only viewed still among them."""
        return list(self._owners.values())

    def owner_of(self, tensor: Tensor) -> int | None:
        """Who uses the frame under a tensor; None when the tensor is not in the arena."""
        return self.owner_at(tensor.untyped_storage().data_ptr())

    def owner_at(self, address: int) -> int | None:
        """Who uses, or used, the frame at this address."""
        return self._owners.get(address)

    def lend(self, frame: Frame) -> Tensor:
        """A uint8 tensor over the whole frame, which stays in use until every view of it dies."""
        token = _Token()
        address = frame.address
        self._views[address] += 1
        weakref.finalize(token, self._end, address).atexit = False
        return self.memory.over(address, frame.size_bytes, token)

    def viewed(self, frame: Frame) -> bool:
        """Whether any tensor over the frame is alive."""
        self.collect()
        return bool(self._views[frame.address])

    def collect(self) -> None:
        """Take note of views that have died since the last look."""
        while self._ended:
            address = self._ended.popleft()
            self._views[address] -= 1
            if not self._views[address]:
                del self._views[address]
                frame = self._waiting.pop(address, None)
                if frame is not None:
                    self._rest(frame)

    def close(self) -> None:
        """Free every frame, those that are still viewed as soon as they are not."""
        self._closed = True
        self.collect()
        self.trim()

    @property
    def waiting(self) -> list[Frame]:
        """Frames that were given back but cannot be reused yet."""
        self.collect()
        return list(self._waiting.values())

    @property
    def viewed_bytes(self) -> int:
        """Bytes of those."""
        return sum(f.size_bytes for f in self.waiting)

    def _end(self, address: int) -> None:
        """A lease has ended, on whichever thread; its owner looks when it next needs room."""
        self._ended.append(address)
        if self._closed:
            self.collect()
            self.trim()

    def _rest(self, frame: Frame) -> None:
        owner = self._owners.pop(frame.address, None)
        if self.poison:
            self.memory.poison(frame)
        self.memory.retire(frame.address)
        self._idle[frame.size_bytes].append(frame)
        self.idle_bytes += frame.size_bytes
        if self.seen is not None and owner is not None:
            self.seen(owner, -frame.size_bytes)

    def _free(self, frame: Frame) -> None:
        self.memory.free(frame.address, frame.size_bytes)
        self._freed(frame)
