"""Train and run models larger than memory, on one machine.

Importing this package loads no engine and no torch; each public name is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offload.api import from_pretrained, init, wrap
    from offload.errors import BudgetError, OffloadError
    from offload.handle import runtime

__all__ = ["BudgetError", "OffloadError", "from_pretrained", "init", "runtime", "wrap"]
__version__ = "0.1.0"

_HOME = {
    "BudgetError": "offload.errors",
    "OffloadError": "offload.errors",
    "runtime": "offload.handle",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'offload' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "offload.api")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
