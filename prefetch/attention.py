"""Where attention over keys and values that live on the host is computed. Pure.

Either the queries go to the host and the result comes back (kilobytes), or a layer's whole history
goes to the device (FlexGen, Sheng et al. 2023, section 4; Lamina, Chen et al. 2024). One history is
compared at a time: the weights of the next layers cross the bus meanwhile in both cases, so a copy
is added to them, while the processor computes beside them. The policy search weighs the same by
lanes (search.py), from rates of a probe; here the rates are of the calls themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

CHOICES = ("auto", "host", "device")
FEW_QUERIES = 8  # tokens a row: products of more are computing, not reading, and the device's
GROWN = 2  # histories so many times as long are measured anew: fixed costs weigh less in them
TRIES = 4  # calls that a rate is taken from, beside the first, which touches memory anew


@dataclass(frozen=True, slots=True)
class Rate:
    """Keys and values put side by side and attended to by one query a row, where they then are:
    bytes a second, None: not tried. ``at_bytes``: of the history that was tried.
    """

    bytes_per_s: float | None = None
    at_bytes: int = 0

    def is_stale(self, history_bytes: int) -> bool:
        """Whether so long a history is to be tried first."""
        return self.bytes_per_s is None or history_bytes > GROWN * self.at_bytes

    def seconds(self, size_bytes: int) -> float:
        assert self.bytes_per_s
        return size_bytes / self.bytes_per_s


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known. ``h2d_bytes_per_s``: None: nothing has crossed yet; ``weight_bytes``: that
    cross for one layer in one pass; ``no_room_bytes``: histories of so much and more were refused
    by the device, None: none was.
    """

    host: Rate = Rate()
    device: Rate = Rate()
    h2d_bytes_per_s: float | None = None
    weight_bytes: float = 0.0
    no_room_bytes: int | None = None


def layer_times(history_bytes: int, queries: int, known: Measured) -> tuple[float, float]:
    """Seconds of a layer whose attention is computed on the host, and on the device.

    Only what differs: the bus in both, and who computes. All rates must be known. A device counts
    with its own time, too, of which a GPU needs next to none; where it is emulated it does not.
    """
    assert known.h2d_bytes_per_s
    weights_s = known.weight_bytes / known.h2d_bytes_per_s
    host_s = known.host.seconds(queries * history_bytes)
    copy_s = history_bytes / known.h2d_bytes_per_s
    return max(weights_s, host_s), weights_s + copy_s + known.device.seconds(history_bytes)


def on_host(asked: str, history_bytes: int, queries: int, known: Measured) -> bool:
    """Whether ``queries`` tokens a row attend on the host to so much history.

    ``asked``: one of ``CHOICES``. Many queries never do: a prompt is computed on the device. With
    "auto" and a rate that is not known, what would measure it is chosen.
    """
    if asked == "device" or not 0 < queries <= FEW_QUERIES or not history_bytes:
        return False
    if asked == "host":
        return True
    if known.no_room_bytes is not None and history_bytes >= known.no_room_bytes:
        return True
    if known.h2d_bytes_per_s is None or known.device.is_stale(history_bytes):
        return False
    if known.host.is_stale(history_bytes):
        return True
    host_s, device_s = layer_times(history_bytes, queries, known)
    return host_s <= device_s
