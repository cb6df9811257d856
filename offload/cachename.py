"""What a model calls the argument that takes keys and values: transformers renamed it in 5.24."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

NEW, OLD = "cache", "past_key_values"


def cache_name(forward: Callable[..., Any]) -> str:
    """Of a model's ``forward``. The other name is deprecated, or not known."""
    return NEW if NEW in inspect.signature(forward).parameters else OLD
