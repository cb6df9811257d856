"""What narrower optimizer state costs the processor: timed here, in some tenths of a second.

As in a step that is short of memory: what a piece is widened into was given back to the system
meanwhile. With memory at hand it takes a third of that (docs/log.md).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.optim.codecs import Bfloat16, Blockwise, Codec, Noise, noise_table
from offload.optim.step import PIECE_ELEMENTS
from offload.tiers import vm

_PIECES = 8
_ROUNDS = 3


def coding_s_per_byte(state_dtype: str) -> float:
    """Seconds for each stored byte of state to be widened and narrowed again."""
    codec: Codec = Bfloat16(torch.float32)
    if state_dtype == "int8":
        codec = Blockwise(torch.float32, signed=True)
    noise = Noise(noise_table(), 1, 0) if state_dtype == "bf16" else None
    pieces = [_stored(codec) for _ in range(_PIECES)]
    stored_bytes = _PIECES * sum(part.nbytes for part in pieces[0])
    return min(_round_s(codec, pieces, noise) for _ in range(_ROUNDS)) / stored_bytes


def _stored(codec: Codec) -> list[Tensor]:
    return [
        torch.ones(-(-PIECE_ELEMENTS // part.elements), dtype=part.dtype)
        for part in codec.parts.values()
    ]


def _round_s(codec: Codec, pieces: Sequence[list[Tensor]], noise: Noise | None) -> float:
    taken_s = 0.0
    for stored in pieces:
        vm.return_freed_memory()
        began_s = time.perf_counter()
        codec.narrow(codec.widen(stored), stored, noise)
        taken_s += time.perf_counter() - began_s
    return taken_s
