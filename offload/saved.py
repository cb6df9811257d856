"""Tensors that autograd saves: signals that a weight is about to be used, and activation bytes.

On the CPU homes have fixed addresses, so a saved weight (or a view of it, such as ``W.t()``) stays
right whatever happens to its backing; packing only notes which chunks it covers, and unpacking,
which autograd does just before the backward operation, asks for them. What is not a weight is kept,
unless the visit of a unit that saves it has something else in mind (offload/visit.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

STALE = (
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation: a tensor of shape {shape} is at version {now}; expected version {then} instead "
    "(seen by offload; the same error as plain PyTorch's)"
)


class Activations:
    """Bytes of saved tensors that are not ours to place, each storage counted once."""

    def __init__(self, take: Callable[[int, str], None], give: Callable[[int], None]) -> None:
        self._take = take
        self._give = give
        self._storages: dict[int, tuple[int, int]] = {}  # data_ptr -> (holders, bytes)
        # A CUDA device's backward nodes let go on autograd's own thread. Reentrant: a collection
        # of garbage may let go of one at any line.
        self._lock = threading.RLock()

    def hold(self, tensor: Tensor) -> int:
        """Count a saved tensor; returns the key to release it with. May raise BudgetError."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        with self._lock:
            holders, size_bytes = self._storages.get(key, (0, storage.nbytes()))
            self._storages[key] = (holders + 1, size_bytes)
        if holders == 0:  # not under the lock: who makes room may wait for other threads
            try:
                self._take(size_bytes, f"a saved activation of shape {tuple(tensor.shape)}")
            except BaseException:
                self._drop(key)
                raise
        return key

    def release(self, key: int) -> None:
        """Autograd has let go of one holder."""
        size_bytes = self._drop(key)
        if size_bytes:
            self._give(size_bytes)

    def _drop(self, key: int) -> int:
        """One holder less; the bytes of the storage when it was the last."""
        with self._lock:
            holders, size_bytes = self._storages.pop(key)
            if holders > 1:
                self._storages[key] = (holders - 1, size_bytes)
        return size_bytes if holders == 1 else 0


class Bytes(Protocol):
    """A storage whose contents are elsewhere."""

    def fetch(self) -> Tensor:
        """Its bytes in memory, as uint8."""
        ...


class Visitor(Protocol):
    """What saving knows of the unit that runs: it may keep a tensor, or do otherwise."""

    def pack(self, tensor: Tensor) -> Packed: ...

    def see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """An operation has given this."""
        ...

    def enter_backward(self) -> None:
        """Something that it saved is about to be used."""
        ...


class Packed(Protocol):
    """What autograd holds in place of a tensor."""

    visit: Visitor | None

    def check(self) -> Tensor:
        """The tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a tensor lies in its storage."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> Geometry:
        return Geometry(tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def over(self, memory: Tensor) -> Tensor:
        """The same tensor over other memory."""
        empty = torch.empty(0, dtype=self.dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), self.offset, self.shape, self.stride)


class Saved:
    """A tensor that is kept; or that was, until its bytes were elsewhere."""

    __slots__ = (
        "__weakref__", "_activations", "_elsewhere", "_key", "chunks", "tensor", "version", "visit",
    )  # fmt: skip

    def __init__(
        self, tensor: Tensor, chunks: tuple[int, ...], activations: Activations | None,
        visit: Visitor | None = None,
    ) -> None:  # fmt: skip
        self.chunks = chunks
        self.visit = visit
        self._elsewhere: tuple[Bytes, Geometry] | None = None
        self._activations = activations
        self._key = activations.hold(tensor) if activations is not None else 0
        # Detached: an operation's own output would refer to its node, and the node to this, in
        # a cycle that no collector sees. The version counter is shared.
        self.tensor: Tensor | None = tensor.detach()
        self.version = tensor._version

    def __del__(self) -> None:
        # `tensor` is set last but one: absent when hold() refused.
        if self._activations is not None and getattr(self, "tensor", None) is not None:
            self._activations.release(self._key)

    def leave(self, elsewhere: Bytes) -> None:
        """Let go of the memory, unless it was written to since: then it stays, to say so."""
        if self.tensor is None or self.tensor._version != self.version:
            return
        self._elsewhere = elsewhere, Geometry.of(self.tensor)
        self.tensor = None
        if self._activations is not None:
            self._activations.release(self._key)

    def check(self) -> Tensor:
        """The tensor, unless it was written to since: torch's own check is off under hooks."""
        if self._elsewhere is not None:
            memory, geometry = self._elsewhere
            return geometry.over(memory.fetch())
        assert self.tensor is not None
        if self.tensor._version != self.version:
            raise RuntimeError(
                STALE.format(
                    shape=list(self.tensor.shape), now=self.tensor._version, then=self.version
                )
            )
        return self.tensor


class SavedTensors:
    """The pair of hooks: ``find`` maps an address range to chunks, ``need`` fetches them."""

    def __init__(
        self,
        find: Callable[[int, int], tuple[int, ...]],
        need: Callable[[tuple[int, ...]], None],
        activations: Activations,
        running: Callable[[], bool],
    ) -> None:
        self.visit: Visitor | None = None  # of the unit whose forward runs
        self._running = running
        self._find = find
        self._need = need
        self._activations = activations

    def chunks_of(self, tensor: Tensor) -> tuple[int, ...]:
        """Chunks that a tensor lies in; empty when it is not ours to place."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return ()
        return self._find(tensor.data_ptr(), span_bytes(tensor))

    def weight(self, tensor: Tensor) -> Saved | None:
        """What is held in place of a weight; None where it is none."""
        chunks = self.chunks_of(tensor)
        return Saved(tensor, chunks, None, self.visit) if chunks else None

    def pack(self, tensor: Tensor) -> Packed:
        """Autograd saves a tensor."""
        if not self._running():  # an interrupt left these hooks behind
            return Saved(tensor, (), None)
        weight = self.weight(tensor)
        if weight is not None:
            return weight
        if self.visit is None:
            return Saved(tensor, (), self._activations)
        return self.visit.pack(tensor)

    def unpack(self, packed: Packed) -> Tensor:
        """Autograd is about to use it."""
        if packed.visit is not None:
            packed.visit.enter_backward()
        if isinstance(packed, Saved) and packed.chunks:
            self._need(packed.chunks)
        return packed.check()


def span_bytes(tensor: Tensor) -> int:
    """Bytes from a tensor's first to its last element, strides considered."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
