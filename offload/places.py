"""Which prompt sits where: places, cohorts, refill. Pure: no torch, no clock, no I/O.

A *place* is room for one row, from its prefill to its end. A *cohort* is a set of rows that were
prefilled together and go through the model as one micro-batch. Rows that have ended leave their
cohort at once; when the free places are enough for a new cohort, one begins. FlexGen (Sheng et
al. 2023) calls all cohorts together a block: its weights are loaded once for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offload.prefetch.cache import LEAST_BLOCK_BYTES

PREFILL_SHARE = 1 / 8  # of the room: activations of the one pass that runs
BLOCK_SHARE = 3 / 4  # of the room: all that is not weights
MOST_ROWS = 64  # in one micro-batch: beyond this a product's rate hardly grows


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """At most ``micro_batches`` times ``batch`` rows at once, in micro-batches of ``batch``.

    While rows end one by one there may be more micro-batches, of fewer rows.
    """

    batch: int
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.micro_batches < 1:
            raise ValueError(f"a block needs at least one row, not {self.batch}x"
                             f"{self.micro_batches}")  # fmt: skip

    @property
    def rows(self) -> int:
        """Places in all."""
        return self.batch * self.micro_batches


@dataclass(frozen=True, slots=True)
class KVCost:
    """Keys and values that live in tiers, within ``memory_bytes``.

    ``layer_bytes``: of one token in one layer; ``layers``: how many there are;
    ``block_tokens``: the least in a block. ``crossing_bytes``: where another tier computes, of one
    token in a layer whose turn it is, there; None: the memory is of the tier that computes.
    """

    memory_bytes: int
    layer_bytes: int
    layers: int
    block_tokens: int = 1
    crossing_bytes: int | None = None

    @property
    def beside_rows_bytes(self) -> int:
        """Of the memory, in the tier that computes."""
        return self.memory_bytes if self.crossing_bytes is None else 0

    def least_bytes(self, plan: BlockPlan, lengths: Sequence[int], new_tokens: int) -> int:
        """Keys and values of one layer, of all rows, and the blocks that are being filled."""
        longest = sorted(lengths, reverse=True)[: plan.rows]
        batch = min(plan.batch, len(longest))
        cohorts = -(-len(longest) // batch)
        block_bytes = max(self.block_tokens * self.layer_bytes * batch, LEAST_BLOCK_BYTES)
        tails_bytes = block_bytes * self.layers * cohorts
        longest_bytes = self.layer_bytes * (sum(longest) + new_tokens * len(longest))
        return tails_bytes + longest_bytes + block_bytes * (1 + cohorts)


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Bytes that a block takes beside the weights.

    ``position_bytes``: keys and values of one token that are in memory as a whole, those beyond
    ``kv``; ``token_bytes``: activations of one token in
    the pass that runs; ``waiting_bytes``: in a pass that waits for its turn; ``row_bytes``: of
    each row whatever its length (logits); ``layers``: that keep keys and values. ``result_bytes``:
    of the largest single result of one token, which the recorded pass makes room for once more;
    ``encoding_bytes``: what an encoder made of one token of a prompt.
    """

    position_bytes: int
    token_bytes: int
    waiting_bytes: int
    row_bytes: int
    kv: KVCost | None = None
    layers: int = 1
    result_bytes: int = 0
    encoding_bytes: int = 0

    def of(self, plan: BlockPlan, lengths: Sequence[int], new_tokens: int) -> int:
        """What a block needs at most where it computes, of prompts of these lengths.

        Keys and values of one micro-batch are moved once more when a row is added to them, a
        layer at a time: that is within ``token_bytes``.
        """
        kept_bytes = self.kv.beside_rows_bytes if self.kv is not None else 0
        return kept_bytes + self._rows_bytes(plan, lengths, new_tokens)

    def largest_result_bytes(self, plan: BlockPlan, lengths: Sequence[int]) -> int:
        """Has to be free beside `of` for the recorded pass, of prompts padded to the longest."""
        return self.result_bytes * max(lengths) * min(plan.batch, len(lengths))

    def kv_bytes(self, plan: BlockPlan, lengths: Sequence[int], new_tokens: int) -> int:
        """Keys and values of all rows, a part of `of`."""
        longest = sorted(lengths, reverse=True)[: plan.rows]
        kept_bytes = self.kv.beside_rows_bytes if self.kv is not None else 0
        kept_bytes += self.crossing_bytes(plan, lengths, new_tokens)
        return kept_bytes + self.position_bytes * (sum(longest) + new_tokens * len(longest))

    def turn_bytes(self, tokens: int, seen: int) -> int:
        """What a pass may take and give back while it has its turn: at most a layer's."""
        return self.token_bytes * tokens + self.position_bytes * seen // self.layers

    def fits(
        self, plan: BlockPlan, lengths: Sequence[int], new_tokens: int, room_bytes: int
    ) -> bool:
        """Whether it needs no more than its share of this room, its keys and values theirs."""
        if self.kv is not None:
            room_bytes -= self.kv.beside_rows_bytes
            if self.kv.least_bytes(plan, lengths, new_tokens) > self.kv.memory_bytes:
                return False
        return self._rows_bytes(plan, lengths, new_tokens) <= BLOCK_SHARE * room_bytes

    def _rows_bytes(self, plan: BlockPlan, lengths: Sequence[int], new_tokens: int) -> int:
        longest = sorted(lengths, reverse=True)[: plan.rows]
        running = sum(longest[: plan.batch])
        return (
            self.crossing_bytes(plan, lengths, new_tokens)
            + self.position_bytes * (sum(longest) + new_tokens * len(longest))
            + self.token_bytes * running
            + self.waiting_bytes * (sum(longest) - running)
            + self.encoding_bytes * sum(longest)
            + self.row_bytes * len(longest)
        )

    def crossing_bytes(self, plan: BlockPlan, lengths: Sequence[int], new_tokens: int) -> int:
        """Of `of`, keys and values of one layer of the rows that have their turn."""
        each = self.kv.crossing_bytes if self.kv is not None else None
        batch = sorted(lengths, reverse=True)[: plan.batch]
        return (each or 0) * (sum(batch) + new_tokens * len(batch))


def choose_block(
    lengths: Sequence[int], new_tokens: int, cost: BlockCost, room_bytes: int
) -> BlockPlan:
    """The most rows that fit: each one more divides the same traffic.

    ``lengths``: of all prompts, in tokens. ``room_bytes``: beside the weights that must be there at
    once. One row at least, whether it fits or not. While the disk is what takes time, a step's
    tokens grow with its rows, and its traffic by less.
    """
    longest = max(lengths)
    free_bytes = room_bytes - (cost.kv.memory_bytes if cost.kv is not None else 0)
    batch = int(PREFILL_SHARE * free_bytes) // max(cost.token_bytes * longest, 1)
    batch = max(1, min(batch, MOST_ROWS, len(lengths)))
    while batch > 1 and not cost.fits(BlockPlan(batch), lengths, new_tokens, room_bytes):
        batch -= 1
    most = -(-len(lengths) // batch)
    count = 1
    while count < most and cost.fits(BlockPlan(batch, count + 1), lengths, new_tokens, room_bytes):
        count += 1
    return BlockPlan(-(-min(len(lengths), batch * count) // count), count)


class Places:
    """Who waits and who has a place. Longest prompts first: what is too large shows at once.

    ``lengths``: tokens of each row's prompt; ``pads``: whether prompts of different lengths may
    share a cohort.
    """

    def __init__(self, lengths: Mapping[int, int], plan: BlockPlan, *, pads: bool = True) -> None:
        order = sorted(lengths, key=lambda row: (-lengths[row], row))
        self._lengths = lengths
        self._waiting = order[::-1]  # the next one is the last
        self._live: set[int] = set()
        self._plan = plan
        self._pads = pads

    @property
    def live(self) -> int:
        """Rows that have a place."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Rows that have not had one."""
        return len(self._waiting)

    @property
    def over(self) -> bool:
        """Whether every row has been and gone."""
        return not self._live and not self._waiting

    def admit(self) -> list[tuple[int, ...]]:
        """Rows that begin now, as cohorts; none until there is room for a whole one."""
        free = min(self._plan.rows - self.live, self.waiting)
        if not free or (free < min(self._plan.batch, self.waiting) and self._live):
            return []
        cohorts = -(-free // self._plan.batch)
        begun: list[tuple[int, ...]] = []
        while free:
            size = -(-free // max(cohorts - len(begun), 1))  # of about the same size
            rows = self._take(min(size, self._plan.batch))
            begun.append(rows)
            free -= len(rows)
        self._live.update(row for rows in begun for row in rows)
        return begun

    def leave(self, row: int) -> None:
        """A row has ended; its place is free."""
        self._live.remove(row)

    def _take(self, most: int) -> tuple[int, ...]:
        rows = [self._waiting.pop()]
        length = self._lengths[rows[0]]
        while len(rows) < most and (self._pads or self._lengths[self._waiting[-1]] == length):
            rows.append(self._waiting.pop())
        return tuple(rows)
