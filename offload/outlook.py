"""What the engine is told of a model before it runs, and how it refuses what cannot fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from offload.errors import BudgetError
from offload.ledger import Ledger
from offload.tiers.spec import format_size


@dataclass(slots=True)
class Outlook:
    """``step_bytes``: the whole of a step's needs, 0 where that cannot be told. ``remedy``: what
    else than memory would help.
    """

    largest_gradient_bytes: int = 0
    largest_update_bytes: int = 0
    step_bytes: Callable[[], int] = lambda: 0
    remedy: str = "use a smaller batch or gradient checkpointing"

    def refusal(self, ledger: Ledger, held_bytes: int, size_bytes: int, what: str) -> BudgetError:
        """The error for ``what``, which takes ``size_bytes`` while chunks in use hold so much."""
        so_far = ledger.fixed_bytes + ledger.other_bytes + held_bytes + size_bytes
        whole = self.step_bytes()
        least = max(so_far, whole)
        known = "the step" if whole >= so_far else "so far the step"
        return BudgetError(
            f"host tier: {what} needs {format_size(size_bytes)} more, but of the budget of "
            f"{format_size(ledger.budget_bytes)} weights, gradients and state in use take "
            f"{format_size(held_bytes)}, activations and gradients in flight "
            f"{format_size(ledger.other_bytes)}, fixed memory {format_size(ledger.fixed_bytes)}; "
            f"{known} needs host_memory of at least {format_size(least)}: give that or "
            f"more, or {self.remedy}",
            tier="host",
            needed_bytes=least,
            given_bytes=ledger.budget_bytes,
            smallest_bytes=least,
        )
