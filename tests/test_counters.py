"""Waits are charged to their cause, and whoever records hears of each."""

from __future__ import annotations

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
