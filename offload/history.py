"""One layer's keys and values: blocks of a fixed number of tokens, each written at most once.

A block is [batch, heads, tokens, dim] of keys, then of values; the one that is being filled stays
in memory. For attention the blocks are copied side by side into memory that all layers share,
contiguous as torch.cat would make them, hence the same bits from the same kernels. Reading them in
place, [tokens, batch, heads, dim] with strides, was tried: as exact, but up to three times slower
in bfloat16 than copying and contiguous attention together (docs/log.md).

Rows are never moved: a block notes which of its rows are the batch's rows now, so beam search,
repeated and selected rows cost no transfer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from offload.errors import OffloadError
from offload.kivi import Kivi, SquaredError
from offload.kvroom import Block
from offload.kvstore import KVStore, Lined
from offload.tiers import vm
from offload.tiers.spec import round_up

ALIGN_BYTES = 64


@dataclass(frozen=True, slots=True)
class Side:
    """What is the same for all keys, or all values: [batch, heads, tokens, dim]."""

    batch: int
    heads: int
    dim: int
    dtype: torch.dtype

    @staticmethod
    def of(states: Tensor) -> Side:
        batch, heads, _, dim = states.shape
        return Side(batch, heads, dim, states.dtype)

    def shape(self, tokens: int) -> torch.Size:
        return torch.Size((self.batch, self.heads, tokens, self.dim))


@dataclass(frozen=True, slots=True)
class Shape:
    """Keys and values, one after the other in memory."""

    keys: Side
    values: Side

    @staticmethod
    def of(keys: Tensor, values: Tensor) -> Shape:
        return Shape(Side.of(keys), Side.of(values))

    def with_rows(self, batch: int) -> Shape:
        return Shape(replace(self.keys, batch=batch), replace(self.values, batch=batch))

    def size_bytes(self, tokens: int) -> int:
        return sum(_padded(side, tokens) for side in (self.keys, self.values))

    def cut(self, memory: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of so many tokens, as views of uint8 memory."""
        split = _padded(self.keys, tokens)
        parts = (memory[:split], self.keys), (memory[split:], self.values)
        keys, values = (
            m[: math.prod(s.shape(tokens)) * s.dtype.itemsize].view(s.dtype).view(s.shape(tokens))
            for m, s in parts
        )
        return keys, values


@dataclass(slots=True, eq=False)
class Rows:
    """What a finished block holds, and which of its rows are the batch's; None: all in order."""

    shape: Shape
    now: Tensor | None = None


class Table(Protocol):
    """Where a layer's keys and values are put side by side, block by block: a `KVStore` does it
    on the host.
    """

    def enter(self, history: Lined) -> None:
        """A history is about to be put together."""
        ...

    def lend(self, size_bytes: int) -> Tensor:
        """uint8 [size_bytes] for all of it, as long as a view of that lives. Raises BudgetError."""
        ...

    def fetch(self, block: Block) -> Tensor:
        """A block's bytes, where the others are. Raises SpillError, BudgetError."""
        ...

    def release(self, block: Block, *, keep: bool) -> None:
        """They were copied from; ``keep``: the block stays in the host's memory."""
        ...


@dataclass(slots=True)
class Errors:
    """Of coded keys and values, over all layers of a cache."""

    keys: SquaredError
    values: SquaredError


class History:
    """The keys and values of one layer. ``codec`` None: blocks hold them as they are."""

    def __init__(
        self, store: KVStore, shape: Shape, block_tokens: int,
        codec: Kivi | None = None, errors: Errors | None = None,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.blocks: list[Block] = []
        self.planned = 0
        self.keep = 0
        self._store = store
        self._block_tokens = block_tokens
        self._coding = (codec, errors) if codec is not None and errors is not None else None
        self._rows: list[Rows] = []  # of each block
        self.tail: Block | None = None
        self._filled = 0  # tokens in the tail
        store.add(self)

    @property
    def tokens(self) -> int:
        return len(self.blocks) * self._block_tokens + self._filled

    @property
    def block_bytes(self) -> int:
        if self._coding is None:
            return self.tail_bytes
        sides = self.shape.keys, self.shape.values
        stored = self._coding[0].stored_bytes(*(s.shape(self._block_tokens) for s in sides))
        return _framed(stored)

    @property
    def tail_bytes(self) -> int:
        return _framed(self.shape.size_bytes(self._block_tokens))

    @property
    def working_bytes(self) -> int:
        return self._lent_bytes((self.planned + 1) * self._block_tokens)

    # -- reading and adding -----------------------------------------------------------------

    def read(self, table: Table | None = None) -> tuple[Tensor, Tensor]:
        """All keys and values, [batch, heads, tokens, dim], contiguous; ``table`` as `append`."""
        return self._gather(table or self._store, 0)

    def append(
        self, keys: Tensor, values: Tensor, table: Table | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; returns all keys and values, the new ones in full precision.

        ``table``: where those are put side by side; None: in the store's memory, on the host.

        Raises BudgetError, SpillError, and OffloadError for other rows or dtypes than before.
        """
        if Shape.of(keys, values) != self.shape:
            raise OffloadError(
                f"the KV cache holds {self.shape} but is given {Shape.of(keys, values)}: use a new "
                "cache for another batch"
            )
        before, new = self.tokens, keys.shape[2]
        all_keys, all_values = self._gather(table or self._store, new)
        all_keys[:, :, before:].copy_(keys)
        all_values[:, :, before:].copy_(values)
        self._take_in(keys, values)
        return all_keys, all_values

    def _gather(self, table: Table, more: int) -> tuple[Tensor, Tensor]:
        """Room for all tokens and ``more``, with those that there are in place."""
        total, size = self.tokens + more, self._block_tokens
        if total // size != self.planned:
            self.planned = total // size
            self._store.changed()
        table.enter(self)
        # In steps of a block, so that the same memory serves the next token.
        keys, values = self.shape.cut(table.lend(self._lent_bytes(total)), total)
        for i, (block, rows) in enumerate(zip(self.blocks, self._rows, strict=True)):
            at = slice(i * size, (i + 1) * size)
            self._decode(table.fetch(block), rows, keys[:, :, at], values[:, :, at])
            table.release(block, keep=i < self.keep)
        if self.tail is not None:
            done = len(self.blocks) * size
            self._copy_tail(table.fetch(self.tail), keys[:, :, done:], values[:, :, done:])
            table.release(self.tail, keep=True)
        return keys, values

    def _copy_tail(self, memory: Tensor, keys: Tensor, values: Tensor) -> None:
        parts = self.shape.cut(memory, self._block_tokens)
        for x, part in zip((keys, values), parts, strict=True):
            x[:, :, : self._filled].copy_(part[:, :, : self._filled])

    def _lent_bytes(self, tokens: int) -> int:
        return self.shape.size_bytes(round_up(tokens, self._block_tokens))

    def _decode(self, memory: Tensor, rows: Rows, keys: Tensor, values: Tensor) -> None:
        plain = self._coding is None
        if not plain and rows.now is None:
            self._codec.load(memory, keys, values)
            return
        if plain:
            parts = rows.shape.cut(memory, self._block_tokens)
        else:
            parts = self._blank(rows.shape, memory.device)
            self._codec.load(memory, *parts)
        for x, part in zip((keys, values), parts, strict=True):
            now = rows.now
            x.copy_(part if now is None else part.index_select(0, now.to(part.device)))

    @property
    def _codec(self) -> Kivi:
        assert self._coding is not None
        return self._coding[0]

    def _blank(self, shape: Shape, place: torch.device) -> tuple[Tensor, Tensor]:
        tokens = self._block_tokens
        memory = torch.empty(shape.size_bytes(tokens), dtype=torch.uint8, device=place)
        return shape.cut(memory, tokens)

    def _take_in(self, keys: Tensor, values: Tensor) -> None:
        done, new = 0, keys.shape[2]
        while done < new:
            if self.tail is None:
                self.tail = self._store.new_block(self.tail_bytes)
            count = min(self._block_tokens - self._filled, new - done)
            self._filled += count
            for part, x in zip(self._in_tail(), (keys, values), strict=True):
                part[:, :, self._filled - count :].copy_(x[:, :, done : done + count])
            done += count
            if self._filled == self._block_tokens:
                self._seal()

    def _in_tail(self) -> tuple[Tensor, Tensor]:
        """Views of the tokens in the block that is being filled."""
        assert self.tail is not None
        assert self.tail.memory is not None
        keys, values = self.shape.cut(self.tail.memory, self._block_tokens)
        return keys[:, :, : self._filled], values[:, :, : self._filled]

    def _seal(self) -> None:
        """The tail is full: it is a block now, and may leave."""
        block, self.tail = self._coded(), None
        self._filled = 0
        self.blocks.append(block)
        self._rows.append(Rows(self.shape))
        self._store.release(block, keep=len(self.blocks) <= self.keep)

    def _coded(self) -> Block:
        assert self.tail is not None
        if self._coding is None:
            return self.tail
        codec, errors = self._coding
        block = self._store.new_block(self.block_bytes)
        assert block.memory is not None
        exact, decoded = self._in_tail(), self._blank(self.shape, block.memory.device)
        codec.store(*exact, block.memory)
        codec.load(block.memory, *decoded)
        errors.keys.add(exact[0], decoded[0])
        errors.values.add(exact[1], decoded[1])
        self._store.forget(self.tail)
        return block

    # -- rows and ends ----------------------------------------------------------------------

    def select_rows(self, rows: Tensor) -> None:
        """The batch is now these of its rows, int64 [new batch]: any order, any number of times."""
        rows = rows.detach().to("cpu", torch.int64)
        batch = self.shape.keys.batch
        if len(rows) == batch and torch.equal(rows, torch.arange(batch)):
            return
        known: dict[int, tuple[Tensor, Tensor]] = {}  # blocks of one age share one tensor
        for held in self._rows:
            before = held.now
            if before is not None and id(before) not in known:
                known[id(before)] = before, before[rows]
            held.now = rows if before is None else known[id(before)][1]
        self._move_tail(rows)
        self.planned = len(self.blocks)
        self._store.changed()

    def _move_tail(self, rows: Tensor) -> None:
        before, old = self.tail, self._in_tail() if self.tail is not None else ()
        shape = self.shape.with_rows(len(rows))
        if before is not None and shape == self.shape:
            for part in old:
                part.copy_(part.index_select(0, rows))
            return
        self.shape = shape
        if before is not None:
            self.tail = self._store.new_block(self.tail_bytes)
            for part, x in zip(self._in_tail(), old, strict=True):
                part.copy_(x.index_select(0, rows))
            self._store.forget(before)

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens``."""
        while tokens < len(self.blocks) * self._block_tokens:
            self._drop_tail()
            block, rows = self.blocks[-1], self._rows[-1]
            left = tokens - (len(self.blocks) - 1) * self._block_tokens
            if left > 0:
                tail = self._store.new_block(self.tail_bytes)
                assert tail.memory is not None
                parts = self.shape.cut(tail.memory, self._block_tokens)
                self._decode(self._store.fetch(block), rows, *parts)
                self.tail, self._filled = tail, left
            self.blocks.pop()
            self._rows.pop()
            self._store.forget(block)
        self._filled = tokens - len(self.blocks) * self._block_tokens
        if self._filled == 0:
            self._drop_tail()
        self.planned = len(self.blocks)
        self._store.changed()

    def close(self) -> None:
        """Forget everything."""
        self._drop_tail()
        for block in self.blocks:
            self._store.forget(block)
        self.blocks.clear()
        self._rows.clear()
        self._store.remove(self)

    def _drop_tail(self) -> None:
        if self.tail is not None:
            self._store.forget(self.tail)
            self.tail, self._filled = None, 0


def _framed(size_bytes: int) -> int:
    """Whole pages, huge ones where little is lost by that."""
    huge = round_up(size_bytes, vm.HUGE_BYTES)
    return huge if huge - size_bytes <= size_bytes // 8 else round_up(size_bytes, vm.PAGE_BYTES)


def _padded(side: Side, tokens: int) -> int:
    return round_up(math.prod(side.shape(tokens)) * side.dtype.itemsize, ALIGN_BYTES)
