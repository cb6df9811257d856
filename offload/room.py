"""Host budgets that no plan can meet, refused before anything is allocated or changed."""

from __future__ import annotations

from collections.abc import Iterable

from offload.config import Given
from offload.errors import BudgetError
from offload.prefetch.room import floor_bytes
from offload.tiers.spec import format_size


def too_small(given: Given, least: int, what: str) -> BudgetError:
    """The error that names what was given and the least that works."""
    remedy = "" if given.disk else ", or a disk=... folder to spill to"
    return BudgetError(
        f"host tier: {what} needs {format_size(least)}, but host_memory is "
        f"{format_size(given.budget.host_bytes)}; give at least {format_size(least)}{remedy}",
        tier="host",
        needed_bytes=least,
        given_bytes=given.budget.host_bytes,
        smallest_bytes=least,
    )


def refuse_without_room(
    sizes: Iterable[tuple[int, str]], given: Given, chunk_bytes: int, copies: int
) -> None:
    """Refuse budgets that no plan can meet for these weights, before anything is allocated."""
    if given.disk is None:
        return
    largest = max(sizes, default=(0, ""))
    least = floor_bytes(largest[0], chunk_bytes, copies)
    if given.budget.host_bytes < least:
        what = f"{largest[1]} ({format_size(largest[0])}), or one update of {copies} chunks,"
        raise too_small(given, least, what)
