"""Where each layer's attention is computed, and its keys and values put together for that.

Decided anew in every call, by prefetch/attention.py, from what earlier calls took.
Imported only where a cache is asked for: transformers is heavy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from offload.attend import Interface, put_on
from offload.history import History
from offload.kvdevice import DeviceTable
from offload.kvroom import Block
from offload.kvstore import KVStore, Lined
from offload.prefetch.attention import TRIES, Measured, on_host
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


class HostMeter:
    """How fast the host attends: bytes of keys and values a second, for one query a row."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self.at_bytes = 0  # of the history that was tried
        self._tries: list[tuple[int, float]] = []

    def note(self, size_bytes: int, seconds: float) -> None:
        """One call's. The first of ``TRIES`` and one more touches memory anew, and is left out."""
        self._tries.append((size_bytes, seconds))
        if len(self._tries) > TRIES:
            counted = self._tries[1:]
            self.bytes_per_s = sum(n for n, _ in counted) / max(sum(s for _, s in counted), 1e-9)
            self.at_bytes = min(n for n, _ in counted)
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
    """See `attend.Ride`. ``size_bytes``: of keys and values, times the queries."""

    layer: Attends
    on_host: bool
    meter: HostMeter
    size_bytes: int = 0
    gathered_s: float = 0.0

    def arrived(self, most_queries: int) -> None:
        self.layer.most_queries = most_queries

    def attended(self, seconds: float) -> None:
        self.meter.note(self.size_bytes, self.gathered_s + seconds)


class Timed:
    """A table on the host which knows how long it waited for the disk; see `history.Table`."""

    def __init__(self, store: KVStore) -> None:
        self.waited_s = 0.0
        self._store = store

    def enter(self, history: Lined) -> None:
        self._store.enter(history)

    def lend(self, size_bytes: int) -> Tensor:
        return self._store.lend(size_bytes)

    def fetch(self, block: Block) -> Tensor:
        began_s = time.perf_counter()
        memory = self._store.fetch(block)
        self.waited_s += time.perf_counter() - began_s
        return memory

    def release(self, block: Block, *, keep: bool) -> None:
        self._store.release(block, keep=keep)


class Whereabouts:
    """Adds to histories in the place where attention to them will be computed."""

    def __init__(self, model: nn.Module, store: KVStore, table: DeviceTable) -> None:
        self.table = table
        self._store = store
        self._interface = Interface(model)
        self._name = type(model).__name__
        self._why_not: str | None = None  # attention cannot be on the host; "": it can
        self._said = False
        self._calls = Calls()
        self._host = HostMeter()
        copied = table.counters
        meter = table.lane.meter
        self._weights = WeightMeter(lambda: meter.moved_bytes - copied.copied_bytes)

    def append(
        self, layer: Attends, history: History, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `History.append`, for keys and values [batch, heads, new, dim] on the device.

        What is returned is on the host where attention is to be computed there.
        """
        if layer.asked != "device" and self._why_not is None:
            self._why_not = self._interface.enter()
        self._weights.turn(history, len(self._store.histories))
        if self._goes_to_host(layer, history, keys.shape[2]):
            return self._append_here(layer, history, keys, values)
        self._calls.device_attentions += history.tokens > 0
        layer.unseen += layer.most_queries is None
        ride = LayerRide(layer, False, self._host)
        return put_on(ride, history.append(keys, values, self.table))

    def stats(self) -> dict[str, Any]:
        """See `KVStore.stats`; ``copied_bytes``: of blocks, to the device."""
        known = self._known()
        return {
            "held_bytes": self.table.room.held_bytes,
            **asdict(self.table.counters),
            **asdict(self._calls),
            "host_bytes_per_s": known.host_bytes_per_s,
            "h2d_bytes_per_s": known.h2d_bytes_per_s,
        }

    def close(self) -> None:
        """There is no history any more: the model's attention is its own again."""
        self.table.close()
        self._weights.forget()
        self._interface.leave()
        self._why_not = None

    def _goes_to_host(self, layer: Attends, history: History, queries: int) -> bool:
        size_bytes = history.shape.size_bytes(history.tokens)
        if not on_host(layer.asked, size_bytes, queries, self._known()):
            return False
        if self._why_not or not layer.most_queries:
            if self._why_not or layer.most_queries == 0 or layer.unseen > 1:
                self._say(self._why_not or NOT_AS_RETURNED)
            return False
        return queries <= layer.most_queries

    def _append_here(
        self, layer: Attends, history: History, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.table.room.held_bytes:
            self.table.close()  # nothing of it is wanted where histories are attended to here
        self._calls.host_attentions += 1
        keys, values = keys.to("cpu"), values.to("cpu")  # waits for what the device computes
        timed, began_s = Timed(self._store), time.perf_counter()
        states = history.append(keys, values, timed)
        gathered_s = time.perf_counter() - began_s - timed.waited_s
        size_bytes = sum(x.nbytes for x in states) * keys.shape[2]
        return put_on(LayerRide(layer, True, self._host, size_bytes, gathered_s), states)

    def _known(self) -> Measured:
        return Measured(
            self._host.bytes_per_s, self._host.at_bytes, _rate(self.table.lane.meter),
            self._weights.layer_bytes,
        )  # fmt: skip

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            print(
                f"offload: keys and values of {self._name} are copied to the device for every "
                f"token, since attention on the host cannot be had: {why}",
                file=sys.stderr,
            )


def _rate(meter: Meter) -> float | None:
    """Bytes a second of a lane while it has work; None before it had."""
    return meter.moved_bytes / meter.busy_s if meter.busy_s else None
