"""Saved activations swapped out: sent away after their unit's forward, back before its backward.

A storage leaves by a *route* (to the disk: offload/swap_disk.py; from a device to the memory of the
host: offload/swap_bus.py). Its tensors are let go of when it has arrived, so nothing is held twice.
On the way back the tensors are built over other memory: shape, strides and 64-byte alignment are
the same, hence the bits.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from offload.engine import Engine
from offload.errors import BudgetError, SpillError
from offload.saved import Saved
from offload.tiers.lane import Lane, Ticket
from offload.tiers.spec import KIB

LEAST_BYTES = 64 * KIB  # smaller storages are kept: a transfer costs more than their room
TICKET_ID = -1  # in a lane's records, where chunks have their numbers


class Spot(Protocol):
    """Where a storage's bytes are while they are away; free for others when nobody has it."""


class Arrival(Protocol):
    """A storage on its way back, or back."""

    ticket: Ticket

    def memory(self) -> Tensor:
        """Its bytes as uint8, for what computes next; the ticket is done."""
        ...


class Route(Protocol):
    """How storages leave the tier where activations are, and come back.

    ``out`` and ``back``: the lanes. ``place``: the device whose tensors it takes.
    """

    place: torch.device
    out: Lane
    back: Lane

    def find(self, size_bytes: int) -> Spot | None:
        """A place for so many bytes; None: there is none. Raises SpillError."""
        ...

    def send(self, source: Tensor, spot: Spot, ticket: Ticket) -> None:
        """Begin to copy uint8 source [n] there; who calls keeps it until the ticket is done."""
        ...

    def fetch(self, spot: Spot, size_bytes: int) -> Arrival:
        """Begin to copy it back into new memory, which has been debited."""
        ...

    def require_open(self) -> None:
        """Raises OffloadError once the run is closed."""
        ...

    def held_bytes(self, size_bytes: int) -> int:
        """What so many bytes take up when they are back."""
        ...

    def collect(self) -> int:
        """Bytes of what came back and is gone since the last call."""
        ...

    @property
    def disk_bytes(self) -> int:
        """Of the disk, that are in use."""
        ...

    def close(self) -> None:
        """Let go of everything; no transfer is under way."""
        ...


class SwapArea:
    """Transfers under way, and the room that they take in the tier where activations are."""

    def __init__(self, engine: Engine, route: Route) -> None:
        self.engine = engine
        self.route = route
        self.moved_bytes = 0
        self._writing: deque[Parked] = deque()
        self.ahead: list[weakref.ref[Parked]] = []  # read, or being read, and not used yet

    def takes(self, tensor: Tensor) -> bool:
        """Whether this tensor's storage can be sent away."""
        return tensor.device == self.route.place

    def park(self, group: list[Saved]) -> Parked | None:
        """Begin to send the storage that these tensors share; they let go of it afterwards.

        None: there is nowhere to send it.
        """
        tensor = group[0].tensor
        assert tensor is not None
        spot = self.route.find(tensor.untyped_storage().nbytes())
        if spot is None:
            return None
        parked = Parked(self, group, spot)
        self._writing.append(parked)
        return parked

    def poll(self) -> None:
        """Finish what is done: credit freed memory, let go of tensors that have been sent."""
        self.ahead = [ref for ref in self.ahead if (p := ref()) is not None and p.is_ahead]
        self._collect()
        while self._writing and self._writing[0].written.done:
            self._writing.popleft().finish_write()

    def relieve(self, desperate: bool = False) -> bool:
        """Wait for one write, for the room it gives; False when there is none under way.

        ``desperate``: where there is none, give up something that was read ahead.
        """
        had_freed = self._collect()
        self.poll()
        if had_freed:
            return True
        if self._writing:
            self._writing.popleft().finish_write()
            return True
        while desperate and self.ahead:
            parked = self.ahead.pop()()
            if parked is not None and parked.give_up():
                return True
        return False

    def close(self) -> None:
        """Await transfers and close the route. Raises nothing: what fails here is not wanted."""
        while self._writing:
            self._writing.popleft().abandon()
        self.poll()
        self.route.close()

    def _collect(self) -> bool:
        freed_bytes = self.route.collect()
        self.engine.ledger.give_other(freed_bytes)
        return freed_bytes > 0


class Parked:
    """One storage on its way out, away, or on its way back."""

    def __init__(self, area: SwapArea, group: list[Saved], spot: Spot) -> None:
        tensor = group[0].tensor
        assert tensor is not None
        storage = tensor.untyped_storage()
        self.size_bytes = storage.nbytes()
        self.written = Ticket(TICKET_ID)
        self._area = area
        self._spot = spot
        self._held: Tensor | None = tensor  # until it is written
        self._group = [weakref.ref(s) for s in group]
        self._arrival: Arrival | None = None
        self._used = False
        area.moved_bytes += self.size_bytes
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        source.set_(storage, 0, (self.size_bytes,), (1,))
        area.route.send(source, spot, self.written)

    @property
    def is_away(self) -> bool:
        """Whether its bytes are elsewhere alone."""
        return self._held is None and self._arrival is None

    @property
    def is_ahead(self) -> bool:
        """Whether it was read, or is being read, and not used yet."""
        return self._arrival is not None and not self._used

    def finish_write(self) -> None:
        """The tensors go. Raises SpillError where the write failed (they then stay)."""
        self._wait("write", self._area.route.out, self.written, "written to")
        self._held = None
        for ref in self._group:
            saved = ref()
            if saved is not None:
                saved.leave(self)
        self._group.clear()

    def abandon(self) -> None:
        """The run ends: the tensors stay where they are."""
        with contextlib.suppress(OSError):
            self._area.route.out.wait(self.written)
        self._held = None

    def read_ahead(self) -> bool:
        """Begin to read it back, if there is room or room can be made."""
        if not self.is_away:
            return True
        try:
            self._area.engine.make_room_for(self._room_bytes, "a swapped activation")
        except BudgetError:
            return False
        self._load()
        self._area.ahead.append(weakref.ref(self))
        return True

    def give_up(self) -> bool:
        """Let go of what was read ahead; False when it is in use, or gone already."""
        if not self.is_ahead:
            return False
        self.forget()
        return True

    def fetch(self) -> Tensor:
        """Its bytes. Raises SpillError, BudgetError."""
        arrival = self._arrival or self._load()
        self._used = True
        self._wait("read", self._area.route.back, arrival.ticket, "read from")
        return arrival.memory()

    def forget(self) -> None:
        """Let go of what was read: it is still where it was sent."""
        if self._arrival is not None:
            self._wait("read", self._area.route.back, self._arrival.ticket, "read from")
            self._arrival, self._used = None, False
            self._area.poll()

    @property
    def _room_bytes(self) -> int:
        return self._area.route.held_bytes(self.size_bytes)

    def _load(self) -> Arrival:
        area = self._area
        area.route.require_open()
        area.poll()
        area.engine.take_other(self._room_bytes, "a swapped activation")
        area.moved_bytes += self.size_bytes
        self._arrival = area.route.fetch(self._spot, self.size_bytes)
        return self._arrival

    def _wait(self, cause: str, lane: Lane, ticket: Ticket, how: str) -> None:
        engine, start_s = self._area.engine, time.perf_counter()
        try:
            lane.wait(ticket)
            engine.counters.waited(cause, TICKET_ID, start_s)
        except OSError as error:
            raise SpillError(
                f"a saved activation could not be {how} the spill file: {error}"
            ) from error
