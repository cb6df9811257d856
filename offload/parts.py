"""What a run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.utils.hooks import RemovableHandle

from offload.activations import KEEP_ALL, Means
from offload.bind import Binding
from offload.device_hooks import DeviceHooks
from offload.device_side import Device
from offload.early import EarlyUpdate
from offload.engine import Engine
from offload.hooks import Hooks
from offload.kvstore import KVStore
from offload.optim.step import ChunkedStep
from offload.spins import ShortSpins
from offload.steps import Steps
from offload.tiers.spec import Machine


@dataclass(slots=True, eq=False)
class Parts:
    """What a run is made of."""

    engine: Engine
    binding: Binding
    steps: Steps
    spins: ShortSpins
    hooks: Hooks | DeviceHooks | None = None
    stepper: ChunkedStep | None = None
    means: Means = KEEP_ALL
    device: Device | None = None  # compute in frames; None: where the weights are
    early: EarlyUpdate | None = None  # updates during the backward pass
    machine: Machine | None = None  # measured rates that plans are made with; None: no plans
    kv: KVStore | None = None  # what KV caches share, once there is one
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def computing(self) -> Engine:
        """The engine of the tier where activations are."""
        return self.device.engine if self.device is not None else self.engine
