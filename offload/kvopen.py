"""The store of a run's KV caches: its limit, its file, its place in the engine's order."""

from __future__ import annotations

import sys

from torch import nn

from offload.config import Given
from offload.errors import OffloadError
from offload.kvdevice import DeviceRoom, DeviceTable
from offload.kvroom import BlockFile, Room
from offload.kvstore import Beyond, KVStore
from offload.parts import Parts
from offload.prefetch.attention import CHOICES
from offload.swap_disk import SwapFile
from offload.tiers.spec import format_size


def check_attention(asked: str) -> None:
    """Raises OffloadError for what is no choice."""
    if asked not in CHOICES:
        raise OffloadError(f"attention is one of {', '.join(CHOICES)}: {asked!r}")


def store_of(model: nn.Module, parts: Parts, given: Given, memory_bytes: int | None) -> KVStore:
    """The run's store, with this limit from now on.

    ``memory_bytes`` None: what weights leave of ``host_memory``, at least half of it, and more
    where a layer's history needs more. Raises OffloadError for a limit that the budget has no room
    for, or where open caches have another one.
    """
    capacity = parts.engine.ledger.capacity_bytes
    if memory_bytes is not None and memory_bytes > capacity:
        raise OffloadError(
            f"memory={format_size(memory_bytes)} of the KV cache is more than the "
            f"{format_size(capacity)} that host_memory has for it"
        )
    weights = sum(c.size_bytes for c in parts.engine.space.chunks)
    limit = max(capacity - weights, capacity // 2) if memory_bytes is None else memory_bytes
    if parts.kv is None:
        parts.kv = _open(model, parts, given, limit, hard=memory_bytes is not None)
    elif not parts.kv.histories:
        parts.kv.limit(limit, hard=memory_bytes is not None)
    elif memory_bytes not in (None, parts.kv.room.hard_bytes):
        raise OffloadError(
            f"open KV caches share {format_size(parts.kv.room.limit_bytes)} of memory: close them, "
            "or leave memory away"
        )
    return parts.kv


def _open(model: nn.Module, parts: Parts, given: Given, limit_bytes: int, *, hard: bool) -> KVStore:
    engine, opened = parts.engine, list[KVStore]()

    def squeezed() -> None:
        for kind, track in parts.steps.tracks.items():
            if track.fits:  # weights will leave: the hooks that fetch them are wanted again
                parts.steps.forget(kind)

    room = Room(engine, limit_bytes, hard, lambda: opened[0].shrink(), squeezed)
    store = KVStore(room, BlockFile(engine.space.lanes, _storage(parts, given)))
    opened.append(store)
    engine.tenants.join(store.relieve)
    engine.tenants.kv_disk_bytes = lambda: store.file.used_bytes
    store.beyond = _beyond(model, parts, given, store)
    return store


def _beyond(model: nn.Module, parts: Parts, given: Given, store: KVStore) -> Beyond | None:
    """What brings histories to a device with memory of its own, or attention to them."""
    if parts.device is None or given.place is None or not given.place.own_memory:
        return None
    from offload.kvwhere import Whereabouts

    engine = parts.device.engine
    frames = engine.frames
    table = DeviceTable(store, DeviceRoom(engine), frames.copier, frames.lanes["read"])
    engine.tenants.join(table.relieve)
    return Whereabouts(model, store, table)


def _storage(parts: Parts, given: Given) -> SwapFile | None:
    """A spill file in what weights leave of the disk."""
    if given.disk is None:
        return None
    limit, disk = given.budget.disk_bytes, parts.engine.space.disk
    left = None if limit is None or disk is None else limit - disk.used_bytes
    return SwapFile(given.disk, left, lambda line: print(f"offload: {line}", file=sys.stderr))
