"""What of a KV cache stays in memory: decisions from numbers alone.

Generation reads every layer's keys and values once per token, in the same order each time. Under
such a cyclic scan a byte in memory saves one byte read per pass wherever it is, and recency means
nothing: what was used last is wanted last. So every layer keeps a fixed share and streams the rest,
with equal rests, since the largest rest is what reading ahead needs room for. (Rates would not
change this: each byte costs the same to read.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.tiers.spec import KIB, MIB, round_up

MOST_TOKENS = 512
GOOD_BLOCK_BYTES = 2 * MIB  # a huge page: smaller pages halve the disk's rate
LEAST_BLOCK_BYTES = 16 * KIB
TAIL_SHARE = 4  # blocks that are being filled take about one part in so many of the limit


@dataclass(frozen=True, slots=True)
class Line:
    """The finished blocks of one layer's history."""

    blocks: int
    block_bytes: int

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.block_bytes

    def kept_beside(self, rest_bytes: int) -> int:
        """Blocks to keep so that at most ``rest_bytes`` are streamed."""
        return self.blocks - min(rest_bytes // self.block_bytes, self.blocks)


@dataclass(frozen=True, slots=True)
class Spread:
    """How many leading blocks each line keeps, and the room for reading ahead."""

    keep: tuple[int, ...]
    ahead_bytes: int


def spread(lines: Sequence[Line], room_bytes: int) -> Spread:
    """Least streaming for this room, with the largest streamed rest read ahead whole.

    Where not even that has room nothing is kept, and the room there is serves reading ahead,
    at least one block.
    """
    if sum(line.size_bytes for line in lines) <= room_bytes:
        return Spread(tuple(line.blocks for line in lines), 0)
    low, high = 0, max(line.size_bytes for line in lines)
    if high > room_bytes:
        least = max(line.block_bytes for line in lines)
        return Spread((0,) * len(lines), max(room_bytes, least))
    while low < high:  # the least rest that was found to have room is `high`
        rest = (low + high) // 2
        if _held_bytes(lines, rest) <= room_bytes:
            high = rest
        else:
            low = rest + 1
    return Spread(tuple(line.kept_beside(high) for line in lines), _longest(lines, high))


def _held_bytes(lines: Sequence[Line], rest_bytes: int) -> int:
    kept = sum(line.kept_beside(rest_bytes) * line.block_bytes for line in lines)
    return kept + _longest(lines, rest_bytes)


def _longest(lines: Sequence[Line], rest_bytes: int) -> int:
    rests = ((n.blocks - n.kept_beside(rest_bytes)) * n.block_bytes for n in lines)
    return max(rests, default=0)


def choose_block_tokens(token_bytes: int, lines: int, limit_bytes: int, multiple: int = 1) -> int:
    """Tokens of a block, a multiple of ``multiple``.

    ``token_bytes``: one token's keys and values in one layer, all rows. ``lines``: histories that
    will share ``limit_bytes``, each of which holds one block that is being filled. A block of a
    whole huge page is read at twice the rate of a smaller one, so twice the share is given for it.
    """
    share_bytes = limit_bytes // TAIL_SHARE // max(lines, 1)
    want_bytes = GOOD_BLOCK_BYTES if 2 * share_bytes >= GOOD_BLOCK_BYTES else share_bytes
    tokens = max(want_bytes, LEAST_BLOCK_BYTES) // token_bytes
    return round_up(min(max(tokens, 1), MOST_TOKENS), multiple)
