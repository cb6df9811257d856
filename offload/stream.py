"""The bytes of tensors wherever they live, a chunk at a time, for whoever moves whole models.

Homed tensors are made resident chunk by chunk through the engine, within its budget; reading
them through their mapping would fill the page cache at a fraction of the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from offload.engine import Engine
from offload.errors import CheckpointError
from offload.prefetch.trace import Access, Need, Phase
from offload.stsafe import FileRecord, HashingWriter, Spec, header_of
from offload.tiers import vm
from offload.tiers.home import Backing, Chunk
from offload.tiers.spec import KIB

STAGING_BYTES = 64 * KIB  # copies of tensors that are not in row-major order, or not on the host


def spec_of(name: str, tensor: Tensor) -> Spec:
    """What a file says of a tensor. Raises CheckpointError where it has no bytes of its own."""
    if tensor.layout is not torch.strided or (tensor.numel() and not tensor.data_ptr()):
        raise CheckpointError(
            f"{name} is a {type(tensor).__name__} without plain memory (a sparse, meta or wrapper "
            "tensor), which safetensors files cannot hold"
        )
    return Spec(name, tensor.dtype, tuple(tensor.shape))


def write_tensors(
    engine: Engine,
    path: Path,
    specs: Sequence[Spec],
    tensors: Mapping[str, Tensor],
    helper: Executor,
) -> FileRecord:
    """One safetensors file, durable when this returns. Raises OSError, BudgetError."""
    writer = HashingWriter(path, helper)
    try:
        writer.write(header_of(specs))
        for spec in specs:
            for block in read_tensor(engine, tensors[spec.name]):
                writer.write(block)
        return writer.finish()
    finally:
        writer.close()


@contextmanager
def between_steps(engine: Engine) -> Iterator[None]:
    """Work on the engine that no step's trace or plan takes notice of."""
    trust = engine.moves.trust
    before = engine.recorder, engine.follower, trust.phase
    engine.recorder = engine.follower = None
    trust.phase = Phase.UPDATE
    try:
        yield
    finally:
        try:
            engine.settle()
        finally:
            engine.recorder, engine.follower, trust.phase = before


def read_tensor(engine: Engine, tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in row-major order; each block is valid until the next is asked for."""
    tensor = tensor.detach()
    if tensor.is_cpu and tensor.is_contiguous():
        yield from _spans(engine, tensor, overwrite=False)
        return
    for rows in _rows(engine, tensor, Access.READ):
        staged = rows.contiguous().cpu()
        yield _bytes(staged.data_ptr(), staged.numel() * staged.element_size())


def fill_tensor(engine: Engine, tensor: Tensor, read_into: Callable[[memoryview], None]) -> None:
    """Overwrite a tensor with bytes in row-major order, as ``read_into`` gives them."""
    tensor = tensor.detach()
    if tensor.is_cpu and tensor.is_contiguous():
        for block in _spans(engine, tensor, overwrite=True):
            read_into(block)
        return
    for rows in _rows(engine, tensor, Access.WRITE):
        staged = torch.empty(rows.shape, dtype=rows.dtype, device="cpu")
        read_into(_bytes(staged.data_ptr(), staged.numel() * staged.element_size()))
        rows.copy_(staged)


def _spans(engine: Engine, tensor: Tensor, *, overwrite: bool) -> Iterator[memoryview]:
    """The memory of a contiguous tensor, chunk by chunk, resident while it is looked at."""
    start = tensor.data_ptr()
    stop = start + tensor.numel() * tensor.element_size()
    if start == stop:
        return
    chunks = engine.space.chunks_at(start, stop - start)
    if not chunks:
        yield _bytes(start, stop - start)
    for c in chunks:
        chunk = engine.space.chunks[c]
        a, b = max(start, chunk.address), min(stop, chunk.address + chunk.size_bytes)
        access = _overwriting(chunk, b - a) if overwrite else Access.READ
        engine.need(Phase.UPDATE, (Need(c, access),))
        yield _bytes(a, b - a)


def _overwriting(chunk: Chunk, size_bytes: int) -> Access:
    """What is void, or will be overwritten whole, need not be read first."""
    fresh = chunk.backing is Backing.VOID or size_bytes == chunk.size_bytes
    return Access.FRESH if fresh else Access.WRITE


def _rows(engine: Engine, tensor: Tensor, access: Access) -> Iterator[Tensor]:
    """Slices along the first dimension [rows, ...]; room for a copy of each is debited.

    Elements of one row may lie anywhere in such a tensor, so all of its chunks are resident.
    """
    if tensor.numel() == 0:
        return
    size_bytes = tensor.numel() * tensor.element_size()
    chunks = engine.space.chunks_at(tensor.data_ptr(), size_bytes) if tensor.is_cpu else ()
    void = {c for c in chunks if engine.space.chunks[c].backing is Backing.VOID}
    fresh = access is Access.WRITE
    needs = tuple(Need(c, Access.FRESH if fresh and c in void else access) for c in chunks)
    if needs:
        engine.need(Phase.UPDATE, needs)
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    row_bytes = size_bytes // len(tensor)
    count = max(STAGING_BYTES // row_bytes, 1)
    staging_bytes = min(count, len(tensor)) * row_bytes
    engine.take_other(staging_bytes, "staging of a checkpoint")
    try:
        for i in range(0, len(tensor), count):
            yield tensor[i : i + count]
    finally:
        engine.ledger.give_other(staging_bytes)


def _bytes(address: int, size_bytes: int) -> memoryview:
    return memoryview(vm.buffer_at(address, size_bytes)).cast("B")
