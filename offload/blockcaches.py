"""Where the keys and values of a block of rows live: whole in memory, or in tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from offload.blockroom import (
    block_cost,
    block_room_bytes,
    largest_unit_bytes,
    least_frames_bytes,
)
from offload.cohort import dynamic_caches
from offload.config import Given, Size
from offload.errors import BudgetError, OffloadError
from offload.hooks import Hooks
from offload.kivi import BITS, GROUP
from offload.kvstore import KVStore
from offload.parts import Parts
from offload.places import BlockCost, BlockPlan, KVCost, choose_block
from offload.prefetch.attention import CHOICES
from offload.prefetch.cache import choose_block_tokens
from offload.tiers.spec import format_size, parse_size


@dataclass(frozen=True, slots=True)
class KVAsked:
    """Keys and values in tiers: in so much memory (None: half of what weights leave), so coded.

    ``attention``: to what is on the host, with a device: see `Runtime.kv_cache`.

    Raises ValueError for what is no size or no dtype.
    """

    memory: Size | None = None
    kv_dtype: str | None = None
    attention: str = "auto"

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_size(self.memory)
        if self.kv_dtype not in (None, *BITS):
            raise ValueError(f"kv_dtype is one of {', '.join(BITS)} or None: {self.kv_dtype!r}")
        if self.attention not in CHOICES:
            raise ValueError(f"attention is one of {', '.join(CHOICES)}: {self.attention!r}")

    @property
    def in_tiers(self) -> bool:
        """Whether anything was asked for."""
        return self.memory is not None or self.kv_dtype is not None


class Caches(Protocol):
    """Makes a cache for each cohort. ``cost``: what rows need of memory, so kept."""

    cost: BlockCost

    @contextmanager
    def opened(self, plan: BlockPlan) -> Iterator[None]:
        """While a block of this plan runs; what was not ended ends here."""
        yield

    def new(self, tokens: int) -> Any:
        """A cache of transformers' kind for rows of so many tokens."""
        ...

    def end(self, cache: Any) -> None:
        """Its cohort has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Provision:
    """How many rows at once, what they need beside the weights, and their caches.

    ``crossing_bytes``: of these, keys and values that are debited when they come, not before.
    """

    plan: BlockPlan
    reserved_bytes: int
    kv_bytes: int  # of these
    caches: Caches
    crossing_bytes: int = 0

    @property
    def passing_bytes(self) -> int:
        """What malloc may have had and got back in one step: all but what is in frames."""
        kv = self.caches.cost.kv
        return self.reserved_bytes - (kv.beside_rows_bytes if kv is not None else 0)


def provide(
    model: nn.Module, parts: Parts, lengths: Sequence[int], new_tokens: int,
    plan: BlockPlan, caches: Caches,
) -> Provision:  # fmt: skip
    """For prompts of these lengths, in tokens. Raises BudgetError for what cannot fit."""
    cost = caches.cost
    sizes = plan, lengths, new_tokens
    crossing_bytes = cost.crossing_bytes(*sizes)
    provision = Provision(plan, cost.of(*sizes), cost.kv_bytes(*sizes), caches, crossing_bytes)
    capacity_bytes = parts.computing.ledger.capacity_bytes
    frames_bytes = least_frames_bytes(model, parts)
    beside_bytes = frames_bytes + cost.largest_result_bytes(plan, lengths)
    if provision.reserved_bytes + beside_bytes > capacity_bytes:
        smaller = choose_block(lengths, new_tokens, cost, block_room_bytes(model, parts))
        needed_bytes = cost.of(smaller, lengths, new_tokens) + frames_bytes
        needed_bytes += cost.largest_result_bytes(smaller, lengths)
        fits = smaller if needed_bytes <= capacity_bytes else None
        raise _too_large(provision, beside_bytes, fits, parts)
    return provision


def _too_large(
    provision: Provision, least_bytes: int, smaller: BlockPlan | None, parts: Parts
) -> BudgetError:
    """``least_bytes``: beside the block, weights most of all. ``smaller``: a block that fits."""
    plan, ledger = provision.plan, parts.computing.ledger
    tier = "host" if parts.device is None else "device"
    activations_bytes = provision.reserved_bytes - provision.kv_bytes
    needed_bytes = provision.reserved_bytes + least_bytes
    smallest_bytes = needed_bytes + ledger.budget_bytes - ledger.capacity_bytes
    remedies = []
    if smaller is not None and smaller.rows < plan.rows:
        said = f"BlockPlan({smaller.batch}, {smaller.micro_batches})"
        remedies.append(f"a smaller batch ({said} fits)")
    kv = provision.caches.cost.kv
    if kv is None:
        remedies.append("keys and values on disk (kv_memory=...)")
    elif kv.beside_rows_bytes:
        remedies.append("less kv_memory")
    remedies.append(f"{tier}_memory of at least {format_size(smallest_bytes)}")
    return BudgetError(
        f"{tier} tier: the block of rows to generate ({plan.micro_batches} micro-batches of "
        f"{plan.batch}) needs {format_size(provision.kv_bytes)} for keys and values and "
        f"{format_size(activations_bytes)} for activations, beside {format_size(least_bytes)} "
        f"for the weights that are computed with: {format_size(needed_bytes)}, but {tier}_memory "
        f"leaves {format_size(ledger.capacity_bytes)} of {format_size(ledger.budget_bytes)}; give "
        + ", or ".join(remedies),
        tier=tier, needed_bytes=needed_bytes, given_bytes=ledger.budget_bytes,
        smallest_bytes=smallest_bytes,
    )  # fmt: skip


def caches_for(model: nn.Module, parts: Parts, given: Given, asked: KVAsked) -> Caches:
    """Raises OffloadError for models out of whose caches rows cannot be taken."""
    return TieredCaches(model, parts, given, asked) if asked.in_tiers else PlainCaches(model, parts)


class PlainCaches:
    """Whole in memory, where the model computes; see offload/roomcache.py."""

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        self.cost = block_cost(model, parts.device.dtype if parts.device is not None else None)
        self.new = dynamic_caches(model)

    @contextmanager
    def opened(self, plan: BlockPlan) -> Iterator[None]:
        """Nothing is to be done."""
        yield

    def end(self, cache: Any) -> None:
        """It is freed with its cohort."""


class TieredCaches:
    """Managed ones, which share one limit and one file; see offload/kv.py."""

    def __init__(self, model: nn.Module, parts: Parts, given: Given, asked: KVAsked) -> None:
        dynamic_caches(model)  # raises
        memory = asked.memory
        self._memory_bytes = (
            (parts.engine.ledger.capacity_bytes - largest_unit_bytes(model)) // 2
            if memory is None
            else parse_size(memory)
        )
        self._least_tokens = GROUP if asked.kv_dtype is not None else 1
        self.cost = _cost(model, parts, given, self._memory_bytes, self._least_tokens)
        self._model: Any = model
        self._parts = parts
        self._given = given
        self._asked = asked
        self._plan = BlockPlan(1)
        self._open: list[Any] = []

    @contextmanager
    def opened(self, plan: BlockPlan) -> Iterator[None]:
        """See `Caches`. The block has taken from the ledger what ``cost`` says, for all of it."""
        from offload.kvopen import store_of

        store = store_of(self._model, self._parts, self._given, self._memory_bytes)
        self._plan = plan
        store.room.account.prepaid(self._memory_bytes)
        try:
            yield
        finally:
            for cache in list(self._open):
                self.end(cache)
            store.room.account.prepaid(0)

    def new(self, tokens: int) -> Any:
        """Raises OffloadError outside of `opened`. Blocks come as they are needed."""
        from offload.kv import Wanted, new_cache

        cost, plan = self.cost.kv, self._plan
        assert cost is not None
        # Once for all: cohorts that shrink and multiply then fill blocks of no more bytes in all.
        tokens = choose_block_tokens(
            cost.layer_bytes * plan.batch, cost.layers * plan.micro_batches,
            cost.memory_bytes, self._least_tokens,
        )  # fmt: skip
        asked = self._asked
        wanted = Wanted(asked.kv_dtype, tokens, plan.micro_batches, asked.attention)
        cache = new_cache(self._model.config, self._store, wanted)
        self._open.append(cache)
        self._count()
        return cache

    def end(self, cache: Any) -> None:
        """Give back its memory and its room in the file."""
        self._open.remove(cache)
        cache.close()
        self._count()

    @property
    def _store(self) -> KVStore:
        assert self._parts.kv is not None
        return self._parts.kv

    def _count(self) -> None:
        rings = isinstance(self._parts.hooks, Hooks) and self._parts.engine.space.disk is not None
        self._store.side_by_side = max(len(self._open), 1) if rings else 1


def _cost(
    model: nn.Module, parts: Parts, given: Given, memory_bytes: int, least_tokens: int
) -> BlockCost:
    """Layers with sliding windows keep theirs in memory, as transformers does."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cost = block_cost(model, parts.device.dtype if parts.device is not None else None)
    config: Any = model.config
    layers = DynamicCache(config=config).layers  # type: ignore[no-untyped-call,unused-ignore]
    managed = sum(type(layer) is DynamicLayer for layer in layers)
    if not managed:
        raise OffloadError(
            f"{type(model).__name__} has sliding windows in all layers: their keys and values are "
            "bounded, and stay in memory; leave kv_memory and kv_dtype away"
        )
    layer_bytes = cost.position_bytes // len(layers)
    crossing_bytes = None if parts.device is None else 0
    if given.place is not None and given.place.own_memory:
        crossing_bytes = 2 * layer_bytes  # blocks that have crossed, and those side by side
    each = 2 if config.is_encoder_decoder else 1  # its own tokens', and the encoder's
    return replace(
        cost,
        position_bytes=layer_bytes * (len(layers) - managed),
        kv=KVCost(memory_bytes, layer_bytes, each * managed, least_tokens, crossing_bytes),
    )
