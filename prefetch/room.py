"""The least memory that a run takes: one account for what plans it and what refuses it. Pure."""

from __future__ import annotations


def floor_bytes(largest_bytes: int, chunk_bytes: int, copies: int) -> int:
    """Budgets below are refused: the largest tensor beside a chunk, or one update's chunks.

    Any tensor may be asked for as a whole, also one of which a pass looks up a few rows.
    """
    return max(largest_bytes + chunk_bytes, copies * chunk_bytes)


def frames_bytes(unit_bytes: int, chunk_bytes: int) -> int:
    """Whole chunks that hold a module's weights, wherever in a chunk they begin."""
    return (-(-(unit_bytes - 1) // chunk_bytes) + 1) * chunk_bytes if unit_bytes else 0
