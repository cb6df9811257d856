"""Build or load a model whose tensors stand in a scratch file, so that it is never whole in RAM.

While the mode is on, large results of the operations that factories and loaders create weights
with are placed in a mapped, unlinked file. Values are computed by the same kernels in the same
order, so a seeded factory gives the same bits as without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offload.guard import results_on_meta
from offload.internals import TorchDispatchMode
from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.home import Mapping
from offload.tiers.spec import KIB, MIB, round_up

SMALLEST_BYTES = 64 * KIB  # below this a tensor stays ordinary: buffers, biases, temporaries
FLUSH_BYTES = 128 * MIB  # dirty pages of the scratch file are pushed out this often


class ScratchMode(TorchDispatchMode):
    """Large new CPU tensors live in a file under ``folder`` while any of them is alive."""

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        super().__init__()
        self._disk = SpillFile(folder, limit_bytes, announce=lambda _: None)
        self._unflushed_bytes = 0
        aten = torch.ops.aten
        self._fill: dict[Any, Callable[..., Any]] = {
            aten.empty.memory_format: _leave,
            aten.empty_strided.default: _leave,
            aten.empty_like.default: _leave,
            aten.new_empty.default: _leave,
            aten.zeros.default: _leave,  # a new range of the file reads as zeros
            aten.zeros_like.default: _leave,
            aten._to_copy.default: _copy,
            aten.clone.default: _copy,
            aten.cat.default: lambda out, tensors, dim=0: torch.cat(tensors, dim, out=out),
            aten.stack.default: lambda out, tensors, dim=0: torch.stack(tensors, dim, out=out),
        }

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        fill = self._fill.get(func)
        if fill is not None and _on_cpu(args, kwargs):
            shape = results_on_meta(func, args, kwargs)
            if len(shape) == 1 and shape[0].numel() * shape[0].element_size() >= SMALLEST_BYTES:
                out = self._allocate(shape[0])
                fill(out, *args, **{k: v for k, v in kwargs.items() if k == "dim"})
                return out
        return func(*args, **kwargs)

    def close(self) -> None:
        """Push everything out; tensors stay valid while they live."""
        self._flush()
        self._disk.close()

    def _allocate(self, like: Tensor) -> Tensor:
        size_bytes = round_up(like.numel() * like.element_size(), vm.PAGE_BYTES)
        if self._unflushed_bytes + size_bytes > FLUSH_BYTES:
            self._flush()
        self._unflushed_bytes += size_bytes
        offset = self._disk.grow(size_bytes)
        address = vm.reserve(size_bytes)
        vm.map_file(address, size_bytes, self._disk.fd, offset)
        buffer = vm.buffer_at(address, size_bytes)
        buffer.mapping = Mapping(address, size_bytes)  # type: ignore[attr-defined]
        flat = torch.frombuffer(buffer, dtype=like.dtype, count=like.numel())
        return torch.as_strided(flat, like.shape, like.stride()).detach()

    def _flush(self) -> None:
        """Write dirty pages: clean ones the kernel can take back at once, dirty ones it cannot."""
        os.fdatasync(self._disk.fd)
        self._unflushed_bytes = 0


def _on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None:
        return torch.device(device).type == "cpu"
    first = args[0] if args else None
    if isinstance(first, list | tuple) and first:
        first = first[0]
    return first.device.type == "cpu" if isinstance(first, Tensor) else True


def _leave(out: Tensor, *args: Any) -> None:
    """Contents are whatever a new range of the file holds."""


def _copy(out: Tensor, source: Tensor, *args: Any) -> None:
    out.copy_(source)
