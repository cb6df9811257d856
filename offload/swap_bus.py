"""The way down from a device: activations in the memory of the host, or on the disk below it.

A worker copies a storage out on the stream for that direction, after what had computed it; its
tensors are let go of when it has arrived, and only then may the device's memory have another use.
On the way back memory is debited and taken from the allocator first, the copy waits for whatever
compute may still do with that memory, and compute waits for the copy where the tensor is used.
The host's ledger pays for the pages: with a disk weights are evicted for them. What finds no room
goes through a buffer to the spill file, in the same workers; without a disk it stays on the device.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

from offload.activations import Means, Ways
from offload.below import DiskBelow
from offload.device_side import Device
from offload.engine import Engine
from offload.errors import BudgetError, OffloadError
from offload.outlook import Outlook
from offload.prefetch.policy import Link
from offload.prefetch.trace import Trace
from offload.swap import TICKET_ID, Spot, SwapArea
from offload.swap_disk import CLOSED, DiskRoute, Pages, Slot, SwapStore
from offload.tiers import vm
from offload.tiers.bus import Bus
from offload.tiers.copy import Mark
from offload.tiers.lane import Lane, Ticket
from offload.tiers.spec import Machine, format_size, round_up

CHUNKS_IN_USE = 4  # of the host, at any moment of a pass: copied from, gradients, what leaves


def ways_in_frames(host: Engine, device: Device, means: Means) -> Ways:
    """For activations where weights are in frames."""
    store = SwapStore(host, means.file) if means.file is not None else None
    if means.setting == "keep":
        return Ways("keep")
    if device.bus is not None:
        route = BusRoute(device.bus, host, store, device.engine.outlook)
        below = BusBelow(device, route, means.machine)
        return Ways(means.setting, SwapArea(device.engine, route), below)
    if store is None or means.machine is None:
        return Ways(means.setting)
    # Frames in the host's own memory: what leaves them has nowhere to go but the disk.
    area = SwapArea(device.engine, DiskRoute(store, host.space.lanes))
    return Ways(means.setting, area, DiskBelow(host, means.machine, store))


class BusRoute:
    """From tensors of a device to the host's memory, or on to the disk, and back.

    ``outlook``: of the device; told what else would help where there is no room below.
    """

    def __init__(self, bus: Bus, host: Engine, store: SwapStore | None, outlook: Outlook) -> None:
        self.place = bus.arena.memory.device
        self.out, self.back = bus.down, bus.up
        self._bus = bus
        self._host = host
        self._store = store
        self._outlook = outlook
        self._pages_gone: deque[int] = deque()  # bytes of the host's, appended to on any thread
        self._leases = Leases(bus)

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk below the host."""
        return self._store is not None

    @property
    def disk_bytes(self) -> int:
        return self._store.used_bytes if self._store is not None else 0

    def room_bytes(self, *, evicting: bool) -> int:
        """What the host can still take in, with as much set aside as a pass and its update need.

        ``evicting``: what chunks take is counted where they can leave.
        """
        host, space = self._host, self._host.space
        aside_bytes = 2 * host.outlook.largest_gradient_bytes
        if space.disk is None:
            return host.ledger.room_bytes - aside_bytes
        if self._store is not None:
            aside_bytes += self._store.staging_bytes if not self._store.is_open else 0
        largest = max((c.size_bytes for c in space.chunks), default=0)
        aside_bytes += max(CHUNKS_IN_USE * largest, host.outlook.largest_update_bytes)
        held_bytes = 0 if evicting else sum(c.size_bytes for c in space.chunks)
        return host.ledger.capacity_bytes - host.ledger.other_bytes - held_bytes - aside_bytes

    def require_open(self) -> None:
        if self._leases.closed:
            raise OffloadError(CLOSED)

    def held_bytes(self, size_bytes: int) -> int:
        return self._bus.arena.memory.held_bytes(size_bytes)

    def find(self, size_bytes: int) -> Spot | None:
        self._credit_pages()
        pages_bytes = round_up(size_bytes, vm.PAGE_BYTES)
        if pages_bytes <= self.room_bytes(evicting=True):
            try:
                self._host.take_other(pages_bytes, "a swapped activation")
                return Pages(size_bytes, self._pages_gone)
            except BudgetError:  # more is in use than was set aside
                pass
        if self._store is None:
            self._outlook.remedy = self._remedy(size_bytes)
            return None
        self._store.open()
        return Slot(self._store, size_bytes)

    def send(self, source: Tensor, spot: Spot, ticket: Ticket) -> None:
        copier, mark, store = self._bus.copier, self._bus.copier.ready(), self._store

        def down() -> int:
            if isinstance(spot, Pages):
                copier.download(source, spot.memory(), mark)
            elif isinstance(spot, Slot) and store is not None:
                store.write(
                    spot,
                    source.nbytes,
                    lambda stage, at, n: copier.download(
                        source[at : at + n], _over(stage, n), mark
                    ),
                )
            return 0

        self.out.submit(ticket, down, source.nbytes)

    def fetch(self, spot: Spot, size_bytes: int) -> Returned:
        returned, store = Returned(self._leases, size_bytes), self._store
        copier, target = self._bus.copier, returned.target

        def part(stage: int, at: int, count: int) -> None:
            copier.upload(_over(stage, count), target[at : at + count], returned.mark)

        def up() -> int:
            # Refers to `returned`: should nobody want it any more, there is memory to copy to.
            if isinstance(spot, Pages):
                copier.upload(spot.memory(), target, returned.mark)
            elif isinstance(spot, Slot) and store is not None:
                store.read(spot, size_bytes, part)
            return 0

        self.back.submit(returned.ticket, up, size_bytes)
        return returned

    def collect(self) -> int:
        self._credit_pages()
        return self._leases.collect()

    def close(self) -> None:
        self._leases.closed = True
        self._credit_pages()
        if self._store is not None:
            self._store.close()

    def _credit_pages(self) -> None:
        while self._pages_gone:
            self._host.ledger.give_other(self._pages_gone.popleft())

    def _remedy(self, size_bytes: int) -> str:
        ledger = self._host.ledger
        lacking_bytes = size_bytes - self.room_bytes(evicting=True)
        return (
            f"more host_memory, where swapped activations go (host tier: of "
            f"{format_size(ledger.budget_bytes)} all but {format_size(ledger.room_bytes)} is in "
            f"use, give at least {format_size(ledger.budget_bytes + lacking_bytes)}), or a "
            "disk=... folder, or use a smaller batch or gradient checkpointing"
        )


class BusBelow:
    """The host's memory below a device, and the disk below that (``disk``: its measured rates).

    Rates of the bus are those of the copies that were made until now: of weights, of gradients.
    """

    def __init__(self, device: Device, route: BusRoute, disk: Machine | None) -> None:
        self._device = device
        self._route = route
        self._disk = disk
        self._uploaded_bytes = self._swapped_bytes = 0
        self._busy = 0.0  # share of the passes' time

    def look(self, trace: Trace, swapped_bytes: int) -> None:
        """The update is no part of a device's trace, nor of the time that hides copies."""
        uploaded, moved = self._uploaded_bytes, self._swapped_bytes
        self._uploaded_bytes = self._route.back.meter.moved_bytes
        self._swapped_bytes = swapped_bytes
        weights_bytes = self._uploaded_bytes - uploaded - (swapped_bytes - moved) / 2
        rate, computing_s = _rate(self._route.back), sum(m.compute_s for m in trace.moments)
        busy_s = max(weights_bytes, 0) / rate if rate else 0.0
        self._busy = min(busy_s / max(computing_s, 1e-9), 1.0)

    def link(self) -> Link | None:
        up = _rate(self._route.back)
        down = _rate(self._route.out) or up
        if not up:
            return None  # nothing was copied yet, so nothing is known
        beyond = None
        if self._route.has_disk and self._disk is not None:
            beyond = Link(self._disk.write_bytes_per_s, self._disk.read_bytes_per_s)
        # Where weights would have to leave for it, the disk pays as if it went there itself.
        room_bytes = max(self._route.room_bytes(evicting=False), 0)
        return Link(down, up, 1.0 - self._busy, room_bytes=room_bytes, beyond=beyond)

    @property
    def working_bytes(self) -> int:
        return self._device.engine.passing_bytes

    @property
    def displace_s_per_byte(self) -> float:
        """Copies of weights are given up after each pass, unless versions are trusted."""
        rate = _rate(self._route.back)
        return 1.0 / rate if self._device.trust_versions and rate else 0.0


def _rate(lane: Lane) -> float:
    """Bytes a second of the copies that a lane has made; 0: none yet."""
    return lane.meter.moved_bytes / lane.meter.busy_s if lane.meter.busy_s else 0.0


class Leases:
    """Device memory that is lent to tensors which came back; freed on the engine's thread."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.closed = False
        self._ended: deque[tuple[int, int, Mark]] = deque()  # appended to on any thread

    def take(self, size_bytes: int) -> int:
        """The address of so much. Raises OffloadError where the allocator has none."""
        arena = self.bus.arena
        try:
            return arena.memory.allocate(size_bytes)
        except MemoryError:
            arena.trim()  # idle frames make up for what others took of the device
        try:
            return arena.memory.allocate(size_bytes)
        except MemoryError as error:
            raise OffloadError(
                "device_memory has room for a swapped activation, but torch's allocator has no "
                f"{format_size(size_bytes)}: others hold the device's memory, or it is in pieces. "
                "Give less device_memory, or set PYTORCH_ALLOC_CONF=expandable_segments:True. "
                f"({error})"
            ) from error

    def end(self, address: int, size_bytes: int, mark: Mark) -> None:
        """Nobody refers to it any more."""
        self._ended.append((address, size_bytes, mark))
        if self.closed:
            self.collect()

    def collect(self) -> int:
        """Free what has ended; its bytes."""
        found = 0
        while self._ended:
            address, size_bytes, mark = self._ended.popleft()
            self.bus.copier.drain(mark)  # compute has waited for it, unless nobody wanted it
            self.bus.arena.memory.free(address, size_bytes)
            found += size_bytes
        return found


class _Token:
    """Dies with the last tensor over memory that came back."""

    __slots__ = ("__weakref__",)


class Returned:
    """A storage on its way back into new memory of the device, or there."""

    def __init__(self, leases: Leases, size_bytes: int) -> None:
        memory = leases.bus.arena.memory
        self.ticket = Ticket(TICKET_ID)
        self._leases = leases
        self._size_bytes = size_bytes
        self._held_bytes = memory.held_bytes(size_bytes)
        self._address = leases.take(self._held_bytes)
        self.mark = Mark(memory.vacant(self._address))
        self._token = _Token()
        end = weakref.finalize(self._token, leases.end, self._address, self._held_bytes, self.mark)
        end.atexit = False
        self._tensor: Tensor | None = None
        with torch.inference_mode(False):  # the worker that writes to it is in no such mode
            self.target = memory.over(self._address, self._held_bytes, None)[:size_bytes]

    def memory(self) -> Tensor:
        """Its bytes, for what is computed next on the stream that is current."""
        bus = self._leases.bus
        bus.copier.arrive(self.mark)
        if self._tensor is None:
            with torch.inference_mode(False):
                lent = bus.arena.memory.over(self._address, self._held_bytes, self._token)
                self._tensor = lent[: self._size_bytes]
        return self._tensor


def _over(address: int, size_bytes: int) -> Tensor:
    """A buffer of the host as a uint8 tensor [size_bytes]."""
    return torch.frombuffer(vm.buffer_at(address, size_bytes), dtype=torch.uint8)
