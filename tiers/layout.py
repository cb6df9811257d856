"""Tensors -> chunks: one long run of elements, cut at equal lengths. Pure arithmetic.

[Note: one run, cut evenly]
Tensors stand one after another, each start a multiple of 64 elements, hence 64-byte aligned for
every dtype. Where elements are held in fewer than four bytes it is 256 bytes (`align_elements`): a
frame of the device begins at any tensor, as the budget has it, and none may be better or worse
aligned for that, since cuBLASLt chooses an algorithm by it, and with that bits. The run is cut
every ``chunk_elements``; a tensor may straddle a cut, which costs nothing since addresses are
contiguous, and leaves no tail waste and only one frame size.
Weights, gradients and same-shaped optimizer state use the same element offsets, so a chunk of
one mirrors the chunks of the others: an elementwise update needs chunk i of each, and no more.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from offload.tiers.spec import KIB, MIB, round_up

LARGEST_FRAME_BYTES = 64 * MIB  # of neighbours that share a frame; one tensor may be larger
ALIGN_ELEMENTS = 64
ALIGN_BYTES = 256  # the most that a kernel is chosen by, and what a frame begins at
PAGE_ELEMENTS = 4096  # any itemsize then gives whole 4 KiB pages
_LAYER = re.compile(r"(?:.*?\.)?\d+\.")  # "model.layers.3." of "model.layers.3.mlp.up.weight"


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of one tensor that lies in one chunk: tensor elements [start, stop)."""

    tensor: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor of a run stands, in elements. ``starts[i]`` is tensor i's offset."""

    starts: tuple[int, ...]
    numels: tuple[int, ...]
    chunk_elements: int
    total_elements: int  # whole pages, padding included

    @property
    def chunks(self) -> int:
        """How many chunks the run is cut into."""
        return -(-self.total_elements // self.chunk_elements)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """Element range [start, stop) of a chunk; the last may be shorter."""
        start = chunk * self.chunk_elements
        return start, min(start + self.chunk_elements, self.total_elements)

    def chunks_of(self, tensor: int) -> range:
        """The chunks that hold any part of a tensor."""
        start = self.starts[tensor]
        stop = start + max(self.numels[tensor], 1)
        return range(start // self.chunk_elements, -(-stop // self.chunk_elements))

    def coarser(self, elements: int) -> Layout:
        """The layout of one value for each so many elements; chunk i mirrors chunk i of this.

        All starts, ``chunk_elements`` and ``total_elements`` must be multiples of ``elements``.
        """
        return Layout(
            tuple(start // elements for start in self.starts),
            tuple(-(-numel // elements) for numel in self.numels),
            self.chunk_elements // elements,
            self.total_elements // elements,
        )

    def pieces(self, chunk: int) -> list[Piece]:
        """Which parts of which tensors a chunk holds, in order."""
        lo, hi = self.chunk_range(chunk)
        found = []
        for i in range(max(bisect_right(self.starts, lo) - 1, 0), len(self.starts)):
            begin = self.starts[i]
            if begin >= hi:
                break
            start, stop = max(lo - begin, 0), min(hi - begin, self.numels[i])
            if start < stop:
                found.append(Piece(i, start, stop))
        return found


def align_elements(itemsize: int) -> int:
    """What starts are multiples of, where elements are held in so many bytes or more."""
    return max(ALIGN_ELEMENTS, ALIGN_BYTES // itemsize)


def lay_out(
    numels: Sequence[int], chunk_elements: int, block_elements: int = 1,
    align: int = ALIGN_ELEMENTS,
) -> Layout:  # fmt: skip
    """Place tensors of these element counts in a run. ``chunk_elements``: multiple of 4096.

    ``align``: starts are multiples of it.
    ``block_elements``: what mirrors the run has one value for each so many elements, so no such
    block may be cut by a start; chunks must be `page_elements` long, or a multiple.
    """
    page = page_elements(block_elements)
    if chunk_elements <= 0 or chunk_elements % page:
        raise ValueError(f"chunk_elements must be a multiple of {page}: {chunk_elements}")
    align = max(align, block_elements)
    ends = list(accumulate((round_up(max(n, 1), align) for n in numels), initial=0))
    total = round_up(ends[-1], page)
    return Layout(tuple(ends[:-1]), tuple(numels), chunk_elements, total)


def page_elements(block_elements: int) -> int:
    """Elements that fill whole pages in every mirror; values of a block have 4 bytes or more."""
    return max(PAGE_ELEMENTS, PAGE_ELEMENTS // 4 * block_elements)


def choose_chunk_bytes(budget_bytes: int, copies: int) -> int:
    """Chunk size for a budget: 2 to 64 MiB where the budget allows.

    An update needs ``copies`` chunks at once (weight, gradient, states). At least six such sets
    should fit in half the budget: one computing, some being read and written; with three, what
    they take is missed where bytes are saved. Below a huge page each transfer costs more than that
    saves: there three sets will do. 64 MiB, which transfers no faster, is for budgets of models so
    large that planning by smaller chunks would take seconds. (All in docs/log.md.)
    """
    limit = budget_bytes // (12 * copies)
    if limit < 2 * MIB <= 2 * limit:
        return 2 * MIB
    size = 64 * MIB if limit >= 256 * MIB else 32 * MIB
    while size > 16384 and size > limit:
        size //= 2
    return size


def choose_frame_bytes(budget_bytes: int) -> int:
    """How much neighbours that share a frame on the device take together at most.

    Small enough that several are in flight, large enough for the bus.
    """
    return max(min(budget_bytes // 16, LARGEST_FRAME_BYTES), 64 * KIB)


def allocated_bytes(size_bytes: int) -> int:
    """What torch's CUDA allocator takes for a tensor, so that our account is its own.

    Blocks of 512 bytes, and of whole segments of 2 MiB where it would not split off the rest.
    """
    return round_up(size_bytes, 512 if size_bytes <= MIB else 2 * MIB)


def neighbours(names: Sequence[str], layout: Layout, elements: int) -> list[list[int]]:
    """Runs of parameters that share a frame: of one layer, and together not above ``elements``.

    Layers are cut alike, so that few sizes of frames occur and those are reused. A parameter
    above the limit has a frame of its own; empty ones need none.
    """
    runs: list[list[int]] = []
    layer: str | None = None
    for i, name in enumerate(names):
        if layout.numels[i] == 0:
            continue
        found = _LAYER.match(name)
        mine = found[0] if found else ""
        end = layout.starts[i] + layout.numels[i]
        if runs and mine == layer and end - layout.starts[runs[-1][0]] <= elements:
            runs[-1].append(i)
        else:
            runs.append([i])
        layer = mine
    return runs
