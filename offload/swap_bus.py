"""The bus below a device."""

from __future__ import annotations

from offload.activations import Means, Ways
from offload.device_engine import Device
from offload.engine import Engine


def ways_in_frames(host: Engine, device: Device, means: Means) -> Ways:
    """For activations where weights are in frames."""
    return Ways(means.setting)
