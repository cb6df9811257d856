"""Where attention is computed: a pure choice from measured rates."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload.prefetch.attention import FEW_QUERIES, GROWN, Measured, Rate, layer_times, on_host

SIZE = 1 << 30
GPU = Rate(1e15, SIZE)
KNOWN = Measured(Rate(4e9, SIZE), GPU, 10e9)
rates = st.floats(1e6, 1e12)
sizes = st.integers(1, 1 << 40)


def test_what_was_asked_for_is_done_where_it_can_be() -> None:
    assert on_host("host", 1, 1, Measured())
    assert on_host("host", 1, FEW_QUERIES, KNOWN)
    assert not on_host("host", 1, FEW_QUERIES + 1, KNOWN), "prompts stay on the device"
    assert not on_host("host", 0, 1, KNOWN), "there is no history"
    assert not on_host("device", SIZE, 1, Measured(Rate(1e12, SIZE), GPU, 1.0))


def test_what_is_not_known_is_measured() -> None:
    assert not on_host("auto", 1000, 1, Measured()), "a copy measures the bus"
    assert not on_host("auto", 1000, 1, Measured(Rate(1e12, 1000), h2d_bytes_per_s=1.0))
    assert on_host("auto", 1000, 1, Measured(device=GPU, h2d_bytes_per_s=1e12))
    slow = Measured(Rate(1.0, 1000), GPU, 1e12)
    assert not on_host("auto", GROWN * 1000, 1, slow)
    assert on_host("auto", GROWN * 1000 + 1, 1, slow), "it has grown since"


def test_histories_that_the_device_refused_stay_on_the_host() -> None:
    slow = Measured(Rate(1.0, SIZE), GPU, 1e12, no_room_bytes=1000)
    assert on_host("auto", 1000, 1, slow)
    assert not on_host("auto", 999, 1, slow)
    assert on_host("auto", 1000, 1, Measured(no_room_bytes=1000))


def test_weights_on_the_bus_hide_what_the_host_computes() -> None:
    """The host is slower than the bus, but the bus has weights to carry in both cases."""
    assert not on_host("auto", SIZE, 1, KNOWN)
    busy = Measured(KNOWN.host, Rate(2e9, SIZE), 10e9, weight_bytes=3e9)
    assert layer_times(SIZE, 1, busy) == (0.3, 0.3 + SIZE / 10e9 + SIZE / 2e9)
    busy = Measured(KNOWN.host, GPU, 10e9, weight_bytes=3e9)
    assert on_host("auto", SIZE, 1, busy)
    assert not on_host("auto", SIZE, FEW_QUERIES, busy), "more queries are more work"


@given(sizes, st.integers(1, FEW_QUERIES), rates, rates, rates, st.floats(0, 1e12))
def test_the_faster_is_chosen(
    history: int, queries: int, host: float, device: float, bus: float, weights: float
) -> None:
    known = Measured(Rate(host, history), Rate(device, history), bus, weights)
    here_s, there_s = layer_times(history, queries, known)
    assert on_host("auto", history, queries, known) == (here_s <= there_s)
    more = Measured(Rate(2 * host, history), known.device, bus, weights)
    assert on_host("auto", history, queries, more) >= on_host("auto", history, queries, known)
