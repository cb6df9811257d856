"""P4: a step moves no bytes it need not; cleared gradients above all are never read back."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import offload
from offload.config import Tuning
from offload.prefetch.trace import Access, Phase
from offload.steps import Kind
from offload.tiers.spec import Machine

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

FORMULAS = runpy.run_path(str(Path(__file__).parents[1] / "bench" / "traffic.py"))
MACHINE = Machine(1.8e9, 5.5e9, 1.4e9, 1.4e9, 1e10)


def test_cleared_gradients_start_fresh_and_are_not_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(12)))
    optimizer = torch.optim.AdamW(model.parameters())
    tuning = Tuning(chunk_bytes=65536, machine=MACHINE)
    offload.wrap(model, optimizer, host_memory="700KiB", disk=tmp_path, tuning=tuning)
    for _ in range(4):
        model(torch.randn(4, 128)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with offload.runtime(model) as run:
        trace = run.parts.steps.tracks[Kind.TRAIN].trace
        assert trace is not None
        grads = {c for h in run.parts.binding.homes.values() for c in h.grad_chunks}
        first: dict[int, Access] = {}
        for moment in trace.moments:
            if moment.phase is Phase.BACKWARD:
                for need in moment.needs:
                    first.setdefault(need.chunk, need.access)
        assert run.stats()["counters"]["evictions"] > 50
        assert {first[c] for c in grads} == {Access.FRESH}


def test_replayed_steps_move_little_more_than_the_least_bytes(zoo: Zoo, manage: Manager) -> None:
    model: Any = zoo.build("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    weight_bytes = sum(p.nbytes for p in model.parameters())
    budget_bytes = int(0.4 * 4 * weight_bytes)
    run = manage(model, optimizer, host_bytes=budget_bytes)
    x = torch.arange(8)[None]
    for _ in range(6):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = run.parts.steps.tracks[Kind.TRAIN].replayed_bytes
    settled = [r + w for r, w in zip(moved["read"], moved["write"], strict=True)][2:]
    embedding_bytes = model.get_input_embeddings().weight.nbytes
    room_bytes = budget_bytes - run.parts.engine.ledger.peak_other_bytes
    least = FORMULAS["minimum_bytes"](weight_bytes, 2, room_bytes, embedding_bytes)
    assert len(settled) == 3
    assert max(settled) <= 1.25 * least


def test_minimum_falls_from_all_traffic_to_none() -> None:
    """The formulas of bench/ at their ends: nothing kept, everything kept, never more with more."""
    plain, early = FORMULAS["minimum_bytes"], FORMULAS["minimum_in_backward_bytes"]
    assert (plain(100, 2, 0), early(100, 2, 0)) == (1000, 700)
    assert plain(100, 2, 399) > 0 == plain(100, 2, 400)  # weights, gradients, two moments
    assert early(100, 2, 299) > 0 == early(100, 2, 300)  # gradients need no home
    for formula in (plain, early):
        least = [formula(100, 2, memory) for memory in range(0, 500, 10)]
        assert least == sorted(least, reverse=True)
