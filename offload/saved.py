"""Tensors that autograd saves: signals that a weight is about to be used, and activation bytes.

Nothing is moved here. On the CPU homes have fixed addresses, so a saved weight (or a view of it,
such as ``W.t()``) stays right whatever happens to its backing; packing only notes which chunks
it covers, and unpacking, which autograd does just before the backward operation, asks for them.
"""

from __future__ import annotations

from collections.abc import Callable

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

    def hold(self, tensor: Tensor) -> int:
        """Count a saved tensor; returns the key to release it with. May raise BudgetError."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        holders, size_bytes = self._storages.get(key, (0, 0))
        if holders == 0:
            size_bytes = storage.nbytes()
            self._take(size_bytes, f"a saved activation of shape {tuple(tensor.shape)}")
        self._storages[key] = (holders + 1, size_bytes)
        return key

    def release(self, key: int) -> None:
        """Autograd has let go of one holder."""
        holders, size_bytes = self._storages.pop(key)
        if holders > 1:
            self._storages[key] = (holders - 1, size_bytes)
        else:
            self._give(size_bytes)


class Saved:
    """What autograd holds in place of a saved tensor."""

    __slots__ = ("_activations", "_key", "chunks", "tensor", "version")

    def __init__(
        self, tensor: Tensor, chunks: tuple[int, ...], activations: Activations | None
    ) -> None:
        self.chunks = chunks
        self._activations = activations
        self._key = activations.hold(tensor) if activations is not None else 0
        # Detached: an operation's own output would refer to its node, and the node to this, in
        # a cycle that no collector sees. The version counter is shared.
        self.tensor = tensor.detach()
        self.version = tensor._version

    def __del__(self) -> None:
        # `tensor` is set last but one: absent when hold() refused.
        if self._activations is not None and hasattr(self, "tensor"):
            self._activations.release(self._key)

    def check(self) -> Tensor:
        """The tensor, unless it was written to since: torch's own check is off under hooks."""
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
        self._running = running
        self._find = find
        self._need = need
        self._activations = activations

    def pack(self, tensor: Tensor) -> Saved:
        """Autograd saves a tensor."""
        chunks: tuple[int, ...] = ()
        if not self._running():  # an interrupt left these hooks behind
            return Saved(tensor, chunks, None)
        if tensor.device.type == "cpu" and tensor.numel():
            chunks = self._find(tensor.data_ptr(), span_bytes(tensor))
        return Saved(tensor, chunks, None if chunks else self._activations)

    def unpack(self, saved: Saved) -> Tensor:
        """Autograd is about to use it."""
        if saved.chunks:
            self._need(saved.chunks)
        return saved.check()


def span_bytes(tensor: Tensor) -> int:
    """Bytes from a tensor's first to its last element, strides considered."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
