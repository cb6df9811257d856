"""What a training step holds at least, by arithmetic, so that no time of a borrowed machine goes to
what cannot fit. Needs no torch.

Bytes that a Llama's layer saves for its backward pass were measured with saved-tensor hooks
(tests/test_gpu_check.py does so again); the loss in float32 is transformers': its log-softmax,
and two gradients of that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gpu.shapes import GB, HOST_GIVEN, KEPT_FREE, Shape

# Of a layer, in units of two bytes for each token and hidden element.
SAVED_BF16, SAVED_AUTOCAST, SAVED_LORA = 22.8, 27.7, 17.2
LOSS_BYTES = 12  # for each token and word, at the most
STATE_BYTES = 16  # of a parameter: float32 weight, gradient, two moments


class Stays(Enum):
    """What of the layers' activations is on the device when the loss is there."""

    ALL = "all"
    INPUTS = "inputs of layers"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Need:
    """Bytes at least."""

    device_bytes: int
    host_bytes: int

    def refusal(self, device_bytes: int | None, host_bytes: int) -> str:
        """Why this cannot run with so much; "": it may."""
        if device_bytes is not None and self.device_bytes > device_bytes:
            return _too_little("device", self.device_bytes, device_bytes)
        if self.host_bytes > host_bytes:
            return _too_little("host", self.host_bytes, host_bytes)
        return ""


def _too_little(where: str, needed_bytes: int, given_bytes: int) -> str:
    return (
        f"cannot fit: at least {needed_bytes / GB:.1f} GB of {where} memory,"
        f" but {given_bytes / GB:.1f} GB are given"
    )


def need(shape: Shape, tokens: int, way: str, *, stays: Stays, lora: bool = False) -> Need:
    """Of a step of so many tokens; ``way`` as the programs of this folder call them."""
    unwrapped = way in ("plain", "checkpointing", "save_on_cpu")
    unit = 2 * tokens * shape.hidden
    saved = SAVED_LORA if lora else SAVED_AUTOCAST if unwrapped else SAVED_BF16
    layer_bytes = int(saved * unit)
    input_bytes = unit * (2 if unwrapped and not lora else 1)  # autocast: float32 between layers
    held_bytes = shape.layers * {
        Stays.ALL: layer_bytes, Stays.INPUTS: input_bytes, Stays.NOTHING: 0,
    }[stays]  # fmt: skip
    moment_bytes = LOSS_BYTES * tokens * shape.vocabulary
    if stays is not Stays.ALL:
        moment_bytes = max(moment_bytes, layer_bytes)
    weights_bytes, state_bytes = _weights(shape, way, lora)
    swapped_bytes = shape.layers * layer_bytes if stays is Stays.NOTHING else 0
    device_bytes = weights_bytes + held_bytes + moment_bytes
    if unwrapped and not lora:  # when the backward pass ends, all gradients are there
        device_bytes = max(device_bytes, (STATE_BYTES + 2) * shape.parameters)
    return Need(device_bytes, state_bytes + swapped_bytes)


def _weights(shape: Shape, way: str, lora: bool) -> tuple[int, int]:
    """On the device when the loss is there, and on the host."""
    frozen_bytes, head_bytes = 2 * shape.parameters, 2 * shape.hidden * shape.vocabulary
    if lora:
        return (frozen_bytes, 0) if way == "plain" else (head_bytes, frozen_bytes)
    if way in ("plain", "checkpointing", "save_on_cpu"):
        # Weights, moments, and autocast's copies, which it keeps until the step is over.
        return (STATE_BYTES - 4 + 2) * shape.parameters, 0
    if way == "torchao":
        return frozen_bytes, (STATE_BYTES // 2) * shape.parameters
    return 2 * head_bytes, STATE_BYTES * shape.parameters  # the head and its gradient


def given_bytes(way: str, cap_bytes: int | None) -> int | None:
    """Of a cap: ours is told of a little less."""
    ours = way.startswith("ours")
    return int(cap_bytes * (1 - KEPT_FREE)) if cap_bytes is not None and ours else cap_bytes


def given_host_bytes(host_bytes: int) -> int:
    """Of a host: its budget."""
    return int(HOST_GIVEN * host_bytes)
