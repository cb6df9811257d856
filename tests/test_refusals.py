"""Refusals leave everything as it was; faults of the disk are errors, never wrong numbers."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import offload
from offload.config import Tuning
from offload.errors import BudgetError, OffloadError
from offload.tiers import vm
from offload.tiers.disk import SpillFile
from offload.tiers.spec import KIB
from tests.conftest import MACHINE

if TYPE_CHECKING:
    from tests.conftest import Life, Manager, Numbers, Twins, Zoo


def with_batch_norm() -> nn.Module:
    """Dropout (random numbers) and batch norm (buffers) before the layer that is too large."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 256), nn.ReLU(),
        nn.BatchNorm1d(256), nn.Linear(256, 8),
    )  # fmt: skip


def everything(life: Life) -> Numbers:
    """Copies of weights, buffers, optimizer state and random state."""
    state = life.optimizer.state_dict()["state"]
    return {
        "model": {k: v.clone() for k, v in life.model.state_dict().items()},
        "state": {i: {k: v.clone() for k, v in s.items()} for i, s in state.items()},
        "random": torch.get_rng_state(),
    }


def assert_same(a: object, b: object) -> None:
    """Equality of nested numbers."""
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert_same(value, b[key])
    else:
        assert isinstance(a, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b)


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "no-disk"])
def test_activations_beyond_the_budget_are_refused_in_the_warm_up_step(
    manage: Manager, twins: Twins, disk: bool
) -> None:
    plain, managed = (twins.start(with_batch_norm, torch.optim.AdamW) for _ in range(2))
    weights = sum(p.nbytes for p in managed.params)
    managed.run = manage(
        managed.model, managed.optimizer, disk=disk, prefetch=twins.mode.prefetch,
        host_bytes=256 * KIB if disk else 4 * weights + 256 * KIB,
    )  # fmt: skip
    torch.manual_seed(4)
    before = everything(managed)
    for rows in (200, 800):
        with pytest.raises(BudgetError, match="smaller batch or gradient checkpointing") as refusal:
            managed.loss(0, rows)
        assert refusal.value.smallest_bytes > refusal.value.given_bytes
        assert_same(everything(managed), before)
    assert managed.run.parts.engine.ledger.other_bytes == 0
    torch.manual_seed(4)
    plain.steps(4)
    torch.manual_seed(4)
    managed.steps(4)
    twins.compare(plain, managed)


def test_hopeless_budget_is_refused_before_anything_moves(manage: Manager, twins: Twins) -> None:
    life = twins.start(with_batch_norm, torch.optim.AdamW)
    before, addresses = everything(life), [p.data_ptr() for p in life.params]
    with pytest.raises(BudgetError, match=r"3\.weight .* give at least") as refusal:
        manage(life.model, life.optimizer, host_bytes=40 * KIB)
    assert refusal.value.given_bytes == 40 * KIB
    with pytest.raises(BudgetError, match=r"or a disk=\.\.\. folder to spill to"):
        manage(life.model, life.optimizer, host_bytes=100 * KIB, disk=False)
    assert_same(everything(life), before)
    assert [p.data_ptr() for p in life.params] == addresses
    life.steps(1)  # still a plain model


def test_full_disk_at_wrap_is_refused_before_anything_moves(twins: Twins, tmp_path: Path) -> None:
    life = twins.start(with_batch_norm, torch.optim.AdamW)
    addresses = [p.data_ptr() for p in life.params]
    with pytest.raises(OffloadError, match=r"disk_memory is 64\.0 KiB but the spill file needs"):
        offload.wrap(
            life.model, life.optimizer, host_memory="1MiB", disk=tmp_path, disk_memory="64KiB"
        )
    assert [p.data_ptr() for p in life.params] == addresses
    assert list(tmp_path.iterdir()) == []
    life.steps(1)


def test_budgets_are_not_given_twice(tmp_path: Path) -> None:
    tuning = Tuning(machine=MACHINE)
    made = offload.init(
        lambda: nn.Linear(64, 64), host_memory="1MiB", disk=tmp_path, tuning=tuning
    )  # fmt: skip
    optimizer = torch.optim.AdamW(made.parameters())
    with pytest.raises(OffloadError, match=r"leave host_memory, disk out of wrap\(\)"):
        offload.wrap(made, optimizer, host_memory="2MiB", disk=tmp_path)
    around = nn.Sequential(made)
    offload.wrap(around, optimizer, tuning=tuning)  # taken over, with what was put around it
    assert offload.runtime(around).stats()["tiers"]["host"]["budget_bytes"] == 1 << 20
    with pytest.raises(OffloadError, match="managed already"):
        offload.wrap(nn.Sequential(around), optimizer)
    offload.runtime(around).close()


def refused(
    zoo: Zoo, manage: Manager, kind: tuple[str, str], host_bytes: int
) -> BudgetError | None:
    """The refusal of two steps of one pass each under this budget, if there is one."""
    model = zoo.build(*kind)
    optimizer = torch.optim.AdamW(model.parameters())
    run = manage(model, optimizer, host_bytes=host_bytes)
    try:
        for _ in range(3):
            x = torch.arange(24).reshape(2, 12)
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    except BudgetError as refusal:
        return refusal
    finally:
        run.close()
    return None


@pytest.mark.parametrize("kind", [("llama", "off"), ("llama-tied", "reentrant"), ("gpt2", "off")])
def test_refusal_in_the_warm_up_step_names_the_smallest_budget_that_works(
    zoo: Zoo, manage: Manager, kind: tuple[str, str]
) -> None:
    refusal = refused(zoo, manage, kind, 100 * KIB)
    assert refusal is not None
    assert "; the step needs host_memory of at least" in str(refusal)
    assert refused(zoo, manage, kind, refusal.smallest_bytes) is None
    less = refused(zoo, manage, kind, refusal.smallest_bytes - 4 * KIB)
    assert less is not None
    assert less.smallest_bytes == refusal.smallest_bytes


def test_where_the_step_cannot_be_foreseen_the_refusal_says_so_far(
    zoo: Zoo, manage: Manager
) -> None:
    # Mixtral's experts work on as many rows as the router says.
    refusal = refused(zoo, manage, ("mixtral", "off"), 140 * KIB)
    assert refusal is not None
    assert "; so far the step needs host_memory of at least" in str(refusal)


# -- faults -----------------------------------------------------------------------------------


def faulty_life(manage: Manager, twins: Twins) -> Life:
    """A managed life under a tight budget, two steps old."""
    life = twins.start(with_batch_norm, torch.optim.AdamW)
    life.run = manage(
        life.model, life.optimizer, host_bytes=200 * KIB, prefetch=twins.mode.prefetch,
        adversary=twins.mode.adversary,
    )  # fmt: skip
    life.steps(2)
    return life


def test_flipped_bit_in_the_spill_file_names_the_chunk(
    manage: Manager, twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = twins.start(with_batch_norm, torch.optim.AdamW)
    plain.steps(2)
    life = faulty_life(manage, twins)
    life.evict()
    assert life.run is not None
    disk = life.run.parts.engine.space.disk
    assert isinstance(disk, SpillFile)
    real = disk.pull

    def lying(address: int, size_bytes: int, offset: int) -> None:
        real(address, size_bytes, offset)
        byte = vm.buffer_at(address + size_bytes - 1, 1)
        byte[0] = bytes([byte.raw[0] ^ 0x10])

    monkeypatch.setattr(disk, "pull", lying)
    with pytest.raises(OffloadError, match=r"\) chunk \d+ .* different from what was written"):
        life.steps(1, seed=2)
    monkeypatch.undo()
    for expected, param in zip(plain.params, life.params, strict=True):
        assert torch.equal(expected, param)  # nothing was trained on it


@pytest.mark.parametrize("fault", ["read", "write"])
def test_disk_error_surfaces_and_nothing_is_wrong_afterwards(
    manage: Manager, twins: Twins, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    life = faulty_life(manage, twins)
    assert life.run is not None
    disk = life.run.parts.engine.space.disk

    def broken(address: int, size_bytes: int, offset: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "pull" if fault == "read" else "push", broken)
    with pytest.raises((OSError, OffloadError), match="Input/output error"):
        life.steps(1, seed=2)
    monkeypatch.undo()
    life.optimizer.zero_grad()
    life.steps(2, seed=3)  # the fault has passed: training can go on
    assert all(bool(p.isfinite().all()) for p in life.params)


def test_run_can_be_closed_after_a_disk_error(
    manage: Manager, twins: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = faulty_life(manage, twins)
    assert life.run is not None
    disk = life.run.parts.engine.space.disk

    def broken(address: int, size_bytes: int, offset: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "pull", broken)
    with pytest.raises((OSError, OffloadError), match="Input/output error"):
        life.steps(1, seed=2)
    life.run.close()
    with pytest.raises(OffloadError, match="not managed"):
        offload.runtime(life.model)
    assert all(bool(p.isfinite().all()) for p in life.params)
