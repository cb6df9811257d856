"""A cache as an argument, by the name that the installed transformers has for it."""

from __future__ import annotations

from typing import Any

from offload.cachename import cache_name


def given(model: Any, cache: Any) -> dict[str, Any]:
    """For a model's ``forward`` and ``generate``; nothing without a cache."""
    return {} if cache is None else {cache_name(model.forward): cache}
