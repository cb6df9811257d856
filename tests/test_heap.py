"""What malloc keeps of freed memory counts against the budget (promise P2), measured."""

from __future__ import annotations

import pytest
import torch

from offload.heap import FREE_KEPT_BYTES, Heap, anonymous_bytes, kept_bytes_for
from offload.ledger import Ledger
from offload.tiers.frames import FramePool
from offload.tiers.spec import GIB, MIB
from tests.conftest import Manager, build_mlp

PIECE_BYTES = 64 * 1024  # far below what malloc maps by itself


def make_and_free(size_bytes: int) -> None:
    """Have malloc hold freed memory: its top is taken, so that none goes back by itself."""
    pieces = [torch.ones(PIECE_BYTES // 4) for _ in range(size_bytes // PIECE_BYTES)]
    last = torch.ones(PIECE_BYTES // 4)
    pieces.clear()
    keep.append(last)


keep: list[torch.Tensor] = []


def test_more_than_may_be_kept_goes_back_when_there_is_no_room() -> None:
    heap = Heap(lambda: 0)
    heap.freed(FREE_KEPT_BYTES)
    heap.settle(0)  # the first look finds the baseline
    before = anonymous_bytes()
    make_and_free(48 * MIB)
    heap.freed(48 * MIB)
    assert anonymous_bytes() > before + 40 * MIB, "malloc kept nothing: this proves nothing"
    heap.settle(GIB)
    assert heap.trims == 1, "it was given back though there was room"
    heap.settle(0)
    assert heap.trims == 2
    assert anonymous_bytes() < before + FREE_KEPT_BYTES


def test_what_is_kept_beyond_the_free_part_is_accounted_for() -> None:
    assert kept_bytes_for(100 * MIB) == FREE_KEPT_BYTES
    budget, kept = 600 * MIB, kept_bytes_for(600 * MIB)
    assert FREE_KEPT_BYTES < kept < budget
    ledger = Ledger(budget, FramePool(), 0, kept)
    assert ledger.capacity_bytes == budget - (kept - FREE_KEPT_BYTES)


def test_the_ledger_asks_before_a_frame_is_made() -> None:
    ledger = Ledger(64 * MIB, FramePool())
    ledger.take_other(40 * MIB)
    make_and_free(40 * MIB)
    ledger.give_other(40 * MIB)
    ledger.prepare_frame(8 * MIB, idle=False)
    trims = ledger.heap.trims
    make_and_free(40 * MIB)
    ledger.heap.freed(40 * MIB)
    ledger.prepare_frame(60 * MIB, idle=False)
    assert ledger.heap.trims == trims + 1


@pytest.mark.parametrize(("spare_bytes", "trims"), [(GIB, 1), (0, 2)])
def test_what_a_watched_step_took_may_be_kept_where_the_system_has_it(
    spare_bytes: int, trims: int
) -> None:
    heap = Heap(lambda: 0, spare=lambda: spare_bytes)
    heap.freed(FREE_KEPT_BYTES)
    heap.settle(0)  # the first look finds the baseline
    heap.keep(128 * MIB)
    make_and_free(48 * MIB)
    heap.freed(48 * MIB)
    heap.settle(0)
    assert heap.trims == trims


def test_a_watched_step_is_trimmed_strictly_and_later_ones_by_what_it_took(manage: Manager) -> None:
    """Else what one watched step kept would be what the next may keep, and so on."""
    model = build_mlp()
    assert isinstance(model, torch.nn.Sequential)
    run = manage(model, host_bytes=300_000)
    heap, watch = run.parts.engine.ledger.heap, run.parts.steps.watch
    heap.extra_bytes = GIB
    watched_bytes = 5 * MIB
    seen: list[int] = []

    def see(*_: object) -> None:
        seen.append(heap.extra_bytes)
        watch.excess_bytes = watched_bytes  # what its thread sees here is the machine's affair

    model[2].register_forward_hook(see)
    with torch.no_grad():
        model(torch.ones(2, 64))
    assert seen == [0]
    model(torch.ones(2, 64)).sum().backward()
    run.parts.steps.end()
    assert watched_bytes <= heap.extra_bytes <= watch.excess_bytes
    run.close()
