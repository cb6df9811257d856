"""Measure attention for one token: how fast it goes through keys and values."""

from __future__ import annotations

import statistics
import time

import torch
from torch.nn import functional


def attend_rate(dtype: torch.dtype, rounds: int = 3) -> float:
    """Bytes of keys and values a second: a token is joined to them, then attended for.

    By this process's torch threads; 64 MiB of them in float32, more than a cache holds.
    """
    caches = [torch.randn(2, 8, 16, 512, 64).to(dtype) for _ in range(2)]
    new = torch.randn(8, 16, 1, 64).to(dtype)
    taken = []
    for _ in range(rounds + 1):  # the first one warms up
        begin_s = time.perf_counter()
        for keys, values in caches:
            functional.scaled_dot_product_attention(
                new, torch.cat((keys, new), 2), torch.cat((values, new), 2)
            )
        taken.append(time.perf_counter() - begin_s)
    return sum(c.numel() * c.element_size() for c in caches) / statistics.median(taken[1:])
