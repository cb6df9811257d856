"""What happened in one tier, for stats and for tests that must know that it did."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counters:
    """``stall_s``: seconds the loop waited, by cause. ``below``: of the tier it copies from."""

    demand_loads: int = 0
    planned_loads: int = 0
    evictions: int = 0
    forced_evictions: int = 0
    stall_s: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "write": 0.0, "checksum": 0.0}
    )
    below: Counters | None = None

    def stalled_s(self, *, below: bool) -> float:
        """All seconds so far; with those of the tiers below."""
        mine_s = sum(self.stall_s.values())
        return mine_s + self.below.stalled_s(below=True) if below and self.below else mine_s
