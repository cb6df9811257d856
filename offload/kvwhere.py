"""Where each layer's attention is computed, and its keys and values put together for that.

Decided anew in every call, by prefetch/attention.py, from what earlier calls took.
Imported only where a cache is asked for: transformers is heavy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from offload.attend import Interface, put_on
from offload.errors import BudgetError
from offload.history import History, Table
from offload.kvdevice import DeviceTable
from offload.kvroom import Block
from offload.kvstore import KVStore, Lined
from offload.prefetch.attention import FEW_QUERIES, TRIES, Measured, Rate, on_host
from offload.tiers.lane import Meter

NOT_AS_RETURNED = "its attention does not take them as a cache returns them"


@dataclass(slots=True)
class Attends:
    """What is known of a layer. ``asked``: "auto", "host" or "device"; ``most_queries``: tokens a
    row that may attend on the host, None: its attention was not seen to take what a cache returns,
    though it was given that ``unseen`` times (the first may have been the user's).
    """

    asked: str
    most_queries: int | None = None
    unseen: int = 0


@dataclass(slots=True)
class Calls:
    """How often attention to a history was computed where, since the run began."""

    host_attentions: int = 0
    device_attentions: int = 0


class AttentionMeter:
    """How fast one place attends, in bytes of keys and values; see `Rate`."""

    def __init__(self) -> None:
        self.rate = Rate()
        self._tries: list[tuple[int, int, float]] = []

    def note(self, size_bytes: int, queries: int, seconds: float) -> None:
        """One call's. The first of ``TRIES`` and one more touches memory anew, and is left out."""
        self._tries.append((size_bytes, queries, seconds))
        if len(self._tries) > TRIES:
            counted = self._tries[1:]
            work_bytes = sum(n * queries for n, queries, _ in counted)
            seconds = max(sum(s for *_, s in counted), 1e-9)
            self.rate = Rate(work_bytes / seconds, min(n for n, *_ in counted))
            self._tries.clear()


class WeightMeter:
    """Bytes of weights that cross for one history's layer, from one of its turns to the next."""

    def __init__(self, moved_bytes: Callable[[], int]) -> None:
        self.layer_bytes = 0.0
        self._moved_bytes = moved_bytes
        self._then: dict[int, int] = {}  # by id of a history

    def turn(self, history: History, histories: int) -> None:
        """A history's turn begins, one of so many."""
        now = self._moved_bytes()
        then = self._then.get(id(history))
        if then is not None:
            self.layer_bytes = (now - then) / max(histories, 1)
        self._then[id(history)] = now

    def forget(self) -> None:
        self._then.clear()


@dataclass(slots=True, eq=False)
class LayerRide:
    """See `attend.Ride`. ``meter`` None: this call tells nothing of a rate."""

    layer: Attends
    on_host: bool
    meter: AttentionMeter | None
    size_bytes: int
    queries: int
    gathered_s: float

    def arrived(self, most_queries: int) -> None:
        self.layer.most_queries = most_queries

    def attended(self, seconds: float) -> None:
        if self.meter is not None:
            self.meter.note(self.size_bytes, self.queries, self.gathered_s + seconds)


class Timed:
    """A table that knows how long it was waited for, the disk and the bus; see `history.Table`."""

    def __init__(self, table: Table) -> None:
        self.waited_s = 0.0
        self._table = table

    def enter(self, history: Lined) -> None:
        self._table.enter(history)

    def lend(self, size_bytes: int) -> Tensor:
        return self._table.lend(size_bytes)

    def fetch(self, block: Block) -> Tensor:
        began_s = time.perf_counter()
        memory = self._table.fetch(block)
        self.waited_s += time.perf_counter() - began_s
        return memory

    def release(self, block: Block, *, keep: bool) -> None:
        self._table.release(block, keep=keep)


class Whereabouts:
    """Adds to histories in the place where attention to them will be computed."""

    def __init__(self, model: nn.Module, store: KVStore, table: DeviceTable) -> None:
        self.table = table
        self._store = store
        self._interface = Interface(model)
        self._calls = Calls()
        self._here, self._there = AttentionMeter(), AttentionMeter()
        self._no_room_bytes: int | None = None
        copied = table.counters
        meter = table.lane.meter
        self._weights = WeightMeter(lambda: meter.moved_bytes - copied.copied_bytes)

    def append(
        self, layer: Attends, history: History, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `History.append`, for keys and values [batch, heads, new, dim] on the device.

        What is returned is on the host where attention is to be computed there.
        """
        if layer.asked != "device":
            self._interface.enter()
        self._weights.turn(history, len(self._store.histories))
        if self._goes_to_host(layer, history, keys.shape[2]):
            return self._append_here(layer, history, keys, values)
        try:
            return self._append_there(layer, history, keys, values)
        except BudgetError as error:
            if layer.asked != "auto" or error.tier != "device":
                raise
            self._no_room_bytes = _size_bytes(history)
            if not self._goes_to_host(layer, history, keys.shape[2]):
                raise
            return self._append_here(layer, history, keys, values)

    def stats(self) -> dict[str, Any]:
        """See `KVStore.stats`; ``copied_bytes``: of blocks, to the device."""
        known = self._known()
        return {
            "held_bytes": self.table.room.held_bytes,
            **asdict(self.table.counters),
            **asdict(self._calls),
            "host_bytes_per_s": known.host.bytes_per_s,
            "device_bytes_per_s": known.device.bytes_per_s,
            "h2d_bytes_per_s": known.h2d_bytes_per_s,
        }

    def close(self) -> None:
        """There is no history any more: the model's attention is its own again."""
        self.table.close()
        self._weights.forget()
        self._interface.leave()
        self._no_room_bytes = None

    def _goes_to_host(self, layer: Attends, history: History, queries: int) -> bool:
        if not on_host(layer.asked, _size_bytes(history), queries, self._known()):
            return False
        why_not = self._interface.why_not
        if why_not or not layer.most_queries:
            if why_not or layer.most_queries == 0 or layer.unseen > 1:
                self._interface.say(why_not or NOT_AS_RETURNED)
            return False
        return queries <= layer.most_queries

    def _append_here(
        self, layer: Attends, history: History, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.table.room.held_bytes:
            self.table.close()  # nothing of it is wanted where histories are attended to here
        self._calls.host_attentions += 1
        keys, values = keys.to("cpu"), values.to("cpu")  # waits for what the device computes
        return self._append(LayerRide(layer, True, self._here, 0, 0, 0.0), history, keys, values)

    def _append_there(
        self, layer: Attends, history: History, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        layer.unseen += layer.most_queries is None
        few = history.tokens > 0 and keys.shape[2] <= FEW_QUERIES
        meter = self._there if few else None
        states = self._append(LayerRide(layer, False, meter, 0, 0, 0.0), history, keys, values)
        self._calls.device_attentions += history.tokens > keys.shape[2]
        return states

    def _append(
        self, ride: LayerRide, history: History, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        timed, began_s = Timed(self._store if ride.on_host else self.table), time.perf_counter()
        states = history.append(keys, values, timed)
        ride.gathered_s = time.perf_counter() - began_s - timed.waited_s
        ride.size_bytes, ride.queries = sum(x.nbytes for x in states), keys.shape[2]
        return put_on(ride, states)

    def _known(self) -> Measured:
        return Measured(
            self._here.rate, self._there.rate, _rate(self.table.lane.meter),
            self._weights.layer_bytes, self._no_room_bytes,
        )  # fmt: skip


def _size_bytes(history: History) -> int:
    return history.shape.size_bytes(history.tokens)


def _rate(meter: Meter) -> float | None:
    """Bytes a second of a lane while it has work; None before it had."""
    return meter.moved_bytes / meter.busy_s if meter.busy_s else None
