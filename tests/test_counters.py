"""Waits are charged to their cause, and whoever records hears of each."""

from __future__ import annotations

import time

import pytest

from offload.counters import Counters, Stall
from offload.prefetch.trace import Access, Need, Phase
from offload.tape import Tape, meters_of
from tests.conftest import Manager, build_mlp


def test_a_wait_is_charged_and_told_even_where_it_ends_in_an_error() -> None:
    counters, seen = Counters(), list[Stall]()
    counters.seen = seen.append
    with pytest.raises(OSError, match="broken"), counters.waiting("read", 3):
        raise OSError("broken")
    ((start_s, end_s, cause, chunk),) = seen
    assert (cause, chunk) == ("read", 3)
    assert counters.stall_s == {"read": end_s - start_s, "write": 0.0, "checksum": 0.0}


def test_a_tape_has_the_engines_waits_while_it_records(manage: Manager) -> None:
    engine = manage(build_mlp()).parts.engine
    tape = Tape(engine, 0.0, meters_of(engine), None)
    engine.evict_all()
    before = engine.counters.stall_s["read"]
    engine.need(Phase.FORWARD, (Need(0, Access.READ),))
    waits = [end_s - start_s for start_s, end_s, cause, chunk in tape.stalls if cause == "read"]
    assert sum(waits) == pytest.approx(engine.counters.stall_s["read"] - before)
    assert waits
    tape.give_up()
    known = len(tape.stalls)
    engine.evict_all()
    engine.need(Phase.BACKWARD, (Need(0, Access.READ),))
    assert len(tape.stalls) == known


def test_a_checksum_is_work_and_no_waiting_for_transfers() -> None:
    """So traces count it among what the engine itself takes, and plans foresee it."""
    counters = Counters()
    for cause in ("checksum", "read", "write"):
        with counters.waiting(cause, 0):
            time.sleep(0.002)
    waited_s = counters.stalled_s(below=False)
    assert waited_s == counters.stall_s["read"] + counters.stall_s["write"]
    assert counters.stall_s["checksum"] >= 0.002
