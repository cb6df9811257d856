"""The bus between the host and a device that has memory of its own."""

from __future__ import annotations

from dataclasses import dataclass

from offload.tiers.arena import DeviceArena
from offload.tiers.copy import Copier
from offload.tiers.lane import Lane


@dataclass(frozen=True, slots=True)
class Bus:
    """Its two directions, a lane each, and the memory at its far end."""

    copier: Copier
    arena: DeviceArena
    up: Lane
    down: Lane
