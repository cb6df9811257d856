"""The device tier: chunks of whole parameters that are copied from their homes into frames.

``DeviceSpace`` is to the engine what ``HomeSpace`` is on the host, so the same engine, steps,
recorder, follower and planner serve both levels. Below it stands the host's engine: a load here
is a need there, and so the sequence of uploads is the access trace of the host level. Frames are
never dirty; nothing is ever saved from here.

[Note: frames do not outlive our own code]
A frame is a second copy of a weight. Users may write to a parameter in ways that leave no trace
(``p.data``, numpy), so whenever their code runs between passes no copy is kept: ``retire``
empties the level when a pass ends, and what the plan would have kept is queued for upload again
when the next one begins. Within a pass a write is seen by the parameter's version; where the user
has hooks, which may write without a trace too, checksums of the homes are compared at each use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from offload.bind import Binding, Family, dense_strides
from offload.counters import Counters
from offload.engine import Engine
from offload.errors import OffloadError
from offload.prefetch.trace import Access, Need, Phase
from offload.tiers import vm
from offload.tiers.arena import DeviceArena
from offload.tiers.checksum import checksum_of
from offload.tiers.copy import Copier, LendingHomes, Mark, Upload
from offload.tiers.home import Backing, Chunk, HomeSpace, Region
from offload.tiers.lane import Lane, Ticket
from offload.tiers.layout import neighbours
from offload.tiers.spec import format_size


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter's place on the device: elements from ``offset`` on in a chunk's frame."""

    chunk: int
    index: int  # among the parameters of the chunk
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Source:
    """What fills a device chunk: elements [start, stop) of a family's run of weights."""

    region: Region
    start: int
    stop: int
    dtype: torch.dtype  # of the homes
    params: tuple[nn.Parameter, ...]

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(host chunk id, start, stop) of the parts that lie in one host chunk each."""
        step = self.region.layout.chunk_elements
        for c in range(self.start // step, -(-self.stop // step)):
            yield (
                self.region.chunk_ids.start + c,
                max(self.start, c * step),
                min(self.stop, (c + 1) * step),
            )

    def home(self, start: int, stop: int) -> Tensor:
        """The homes of elements [start, stop) as one flat CPU tensor."""
        itemsize = self.dtype.itemsize
        buffer = vm.buffer_at(self.region.address + start * itemsize, (stop - start) * itemsize)
        buffer.mapping = self.region.mapping  # type: ignore[attr-defined]
        return torch.frombuffer(buffer, dtype=self.dtype)


@dataclass(slots=True)
class Scrutiny:
    """How closely a pass is watched for writes that leave no trace.

    ``careful``: users have hooks, which may write to homes. ``watching``: a recorded forward pass,
    in which a model that writes to its own frames is found out by their ``sums``.
    """

    careful: bool = False
    watching: bool = False
    sums: dict[int, int] = field(default_factory=dict)


class DeviceSpace:
    """The chunks of the device level and the uploads that fill their frames."""

    def __init__(self, arena: DeviceArena, lane: Lane, copier: Copier, host: Engine) -> None:
        self.chunks: list[Chunk] = []
        self.pool = arena
        self.lanes = {"read": lane}
        self.slots: dict[nn.Parameter, Slot] = {}
        self.phase = Phase.FORWARD
        self.scrutiny = Scrutiny()
        self.copier = copier
        self._host = host
        self._sources: list[Source] = []
        self._uploads: dict[int, tuple[Upload, tuple[int, ...]]] = {}  # chunk -> and versions

    def add_family(self, family: Family, dtype: torch.dtype, chunk_bytes: int) -> None:
        """Cut a family of parameters into device chunks of about this size, held as ``dtype``."""
        starts, numels = family.layout.starts, family.layout.numels
        for group in neighbours(family.names, family.layout, chunk_bytes // dtype.itemsize):
            start, stop = starts[group[0]], starts[group[-1]] + numels[group[-1]]
            params = tuple(family.params[i] for i in group)
            size_bytes = self.pool.memory.held_bytes((stop - start) * dtype.itemsize)
            chunk = Chunk(
                len(self.chunks), 0, size_bytes, 0,
                f"device copy of {family.names[group[0]]}...", Backing.FILE,
            )  # fmt: skip
            self.chunks.append(chunk)
            self._sources.append(Source(family.weights, start, stop, params[0].dtype, params))
            for index, (i, param) in enumerate(zip(group, params, strict=True)):
                self.slots[param] = Slot(
                    chunk.id, index, starts[i] - start, param.shape, dense_strides(param), dtype
                )

    @property
    def disk(self) -> HomeSpace:
        """What stands below, where the engine of the host has its disk."""
        return self._host.space

    @property
    def host_counters(self) -> Counters:
        """Of the level that copies are made from."""
        return self._host.counters

    @property
    def pinned_bytes(self) -> int:
        """Host memory that copies read and write without the processor."""
        return self.copier.pinned_bytes

    def copied_bytes(self) -> list[int]:
        """What crosses to the device for each chunk; frames are rounded up."""
        return [(s.stop - s.start) * self.slots[s.params[0]].dtype.itemsize for s in self._sources]

    # -- what the engine asks for -----------------------------------------------------------

    def start_load(self, chunk: Chunk) -> None:
        """Begin to copy a chunk from its homes, having them fetched from disk first."""
        source = self._sources[chunk.id]
        try:
            frame = self.pool.take(chunk.size_bytes)
        except MemoryError as error:
            raise OffloadError(
                f"device_memory has room for the {chunk.label}, but torch's allocator has no "
                f"{format_size(chunk.size_bytes)}: others hold the device's memory, or it is in "
                "pieces. Give less device_memory, or set PYTORCH_ALLOC_CONF="
                f"expandable_segments:True. ({error})"
            ) from error
        self.pool.assign(frame, chunk.id)
        upload = Upload(Mark(self.pool.memory.vacant(frame.address)))
        dtype = self.slots[source.params[0]].dtype
        with torch.inference_mode(False):  # the worker that writes to it is in no such mode
            target = self.pool.memory.over(frame.address, frame.size_bytes, None).view(dtype)
        chunk.frame = frame
        versions = tuple(p._version for p in source.params)
        self._uploads[chunk.id] = upload, versions
        try:
            for host_chunk, start, stop in source.pieces():
                self._host.need(self.phase, (Need(host_chunk, Access.READ),))
                into = target[start - source.start : stop - source.start]
                self._submit(upload, host_chunk, source.home(start, stop), into)
        except BaseException:
            self._wait(upload)
            self.copier.drain(upload.mark)
            self._vacate(chunk)
            raise
        chunk.loading = upload.tickets[-1]

    def install(self, chunk: Chunk, *, user_code: bool = True) -> None:
        """The chunk may be computed with from now on. What users write, ``retire`` takes in."""
        upload, _ = self._uploads[chunk.id]
        self._wait(upload)
        self.copier.arrive(upload.mark)
        chunk.backing, chunk.loading = Backing.RAM, None
        if self.scrutiny.watching and chunk.frame is not None:
            self.scrutiny.sums[chunk.id] = self.pool.memory.checksum(chunk.frame)

    def unchanged(self, chunk: Chunk) -> bool:
        """Frames are only read."""
        return True

    def drop(self, chunk: Chunk, *, dead: bool = False) -> None:
        """Give the frame back; it is free when no tensor refers to it any more."""
        assert chunk.frame is not None
        sum_then = self.scrutiny.sums.pop(chunk.id, None)
        written = sum_then is not None and self.pool.memory.checksum(chunk.frame) != sum_then
        self._vacate(chunk)
        if written:
            self.scrutiny.sums.clear()  # to be said once
            raise OffloadError(
                f"the {chunk.label} was written to: this model changes its weights in its own "
                "forward, which weights in frames cannot honour. Change them between passes, or "
                "compute where the weights are (no device=..., no compute_dtype=...)"
            )

    def loads(self) -> list[Chunk]:
        """Chunks whose upload is under way or done but not installed, in the order of issue."""
        return [self.chunks[c] for c in self._uploads if self.chunks[c].loading is not None]

    def homes_of(self, chunk: int) -> tuple[int, ...]:
        """The host's chunks that one of ours is copied from."""
        return tuple(host_chunk for host_chunk, _, _ in self._sources[chunk].pieces())

    def held(self) -> list[int]:
        """The chunk of each frame that is in use, views by autograd and users included."""
        return self.pool.owners()

    def abandon_load(self, chunk: Chunk) -> None:
        """Give up a copy that was made ahead and is not wanted."""
        upload, _ = self._uploads[chunk.id]
        self._wait(upload)
        self.copier.drain(upload.mark)
        self._vacate(chunk)

    # -- what compute asks for --------------------------------------------------------------

    def view(self, param: nn.Parameter) -> Tensor:
        """A tensor over a resident parameter's part of its frame: own storage, no history."""
        slot = self.slots[param]
        return self.rebuild(slot.chunk, slot.dtype, slot.shape, slot.stride, slot.offset)

    def rebuild(
        self,
        chunk: int,
        dtype: torch.dtype,
        shape: torch.Size,
        stride: tuple[int, ...],
        offset: int,
    ) -> Tensor:
        """A tensor over a resident chunk; ``offset`` in elements of ``dtype``."""
        frame = self.chunks[chunk].frame
        assert frame is not None
        with torch.inference_mode(False):
            flat = self.pool.lend(frame)[: frame.size_bytes // dtype.itemsize * dtype.itemsize]
            return torch.as_strided(flat.view(dtype), shape, stride, offset).detach()

    def outdated(self, param: nn.Parameter) -> bool:
        """Whether the parameter was written to after its copy was begun."""
        slot = self.slots[param]
        known = self._uploads.get(slot.chunk)
        if known is None:
            return False
        return known[1][slot.index] != param._version

    def differs(self, chunk: int) -> bool:
        """Whether homes no longer hold what was copied.

        Homes that were evicted since are fetched for it. To copy anew instead would cost as much
        and leave the chunk on the device twice, where autograd holds views of the older copy.
        """
        upload, _ = self._uploads[chunk]
        pieces = self._sources[chunk].pieces()
        for ticket, (host_chunk, start, stop) in zip(upload.tickets, pieces, strict=True):
            self._host.need(self.phase, (Need(host_chunk, Access.READ),))
            if checksum(self._sources[chunk].home(start, stop)) != ticket.result:
                return True
        return False

    def params_of(self, chunk: int) -> tuple[nn.Parameter, ...]:
        """The parameters whose copies stand in a chunk."""
        return self._sources[chunk].params

    def param_at(self, chunk: int, offset_bytes: int) -> nn.Parameter:
        """The parameter whose elements stand at this offset of a chunk."""
        params = self._sources[chunk].params
        first = self.slots[params[0]].dtype.itemsize
        return max(
            (p for p in params if self.slots[p].offset * first <= offset_bytes),
            key=lambda p: self.slots[p].offset,
        )

    def close(self) -> None:
        """Stop the lane and free the frames that nobody views."""
        for lane in self.lanes.values():
            lane.close()
        self.copier.close()
        self.pool.close()

    # -- inside -----------------------------------------------------------------------------

    def _submit(self, upload: Upload, host_chunk: int, source: Tensor, target: Tensor) -> None:
        ticket = Ticket(host_chunk)
        upload.tickets.append(ticket)
        homes = self._host.space
        assert isinstance(homes, LendingHomes)
        work = partial(_copy, self.copier, source, target, upload.mark, self.scrutiny.careful)
        homes.lend(homes.chunks[host_chunk], self.lanes["read"], ticket)
        self.lanes["read"].submit(ticket, work, target.nbytes)

    def _wait(self, upload: Upload) -> None:
        for ticket in upload.tickets:
            self.lanes["read"].wait(ticket)

    def _vacate(self, chunk: Chunk) -> None:
        assert chunk.frame is not None
        del self._uploads[chunk.id]
        self.pool.give(chunk.frame)
        chunk.frame = chunk.loading = None
        chunk.backing = Backing.FILE


def _copy(copier: Copier, source: Tensor, target: Tensor, mark: Mark, careful: bool) -> int:
    # The checksum comes first: a write meanwhile is then taken for a difference, never missed.
    result = checksum(source) if careful else 0
    copier.upload(source, target, mark)
    return result


def checksum(flat: Tensor) -> int:
    """Checksum of a flat CPU tensor's bytes."""
    return checksum_of(flat.data_ptr(), flat.nbytes)


def frame_dtype(param_dtype: torch.dtype, compute: torch.dtype | None) -> torch.dtype:
    """What a parameter is computed in."""
    return compute if compute is not None and param_dtype.is_floating_point else param_dtype


def add_families(
    space: DeviceSpace, binding: Binding, dtype: torch.dtype | None, chunk_bytes: int
) -> None:
    """Give every parameter its place on the device."""
    for family in binding.families:
        space.add_family(family, frame_dtype(family.params[0].dtype, dtype), chunk_bytes)
