"""Copies, pickles and state dicts of a managed model: plain tensors, of the right size and bits."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import offload
from offload.errors import OffloadError

if TYPE_CHECKING:
    from tests.conftest import Life, Manager, Twins


def test_deepcopy_is_a_plain_model(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        life.evict()
        twin = copy.deepcopy(life.model)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        if life.run is not None:
            with pytest.raises(OffloadError, match="not managed"):
                offload.runtime(twin)
        mine, life.model, life.optimizer = (life.model, life.optimizer), twin, optimizer
        life.steps(2)
        life.model, life.optimizer = mine
        life.steps(2)

    twins(live)


def test_copy_can_be_managed_too(manage: Manager, twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        twin = copy.deepcopy(life.model)
        optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
        if life.run is not None:
            manage(twin, optimizer, host_bytes=2**20)
        life.model, life.optimizer = twin, optimizer
        life.steps(2)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))

    torch.manual_seed(0)
    plain, managed = (twins.start(build, torch.optim.AdamW) for _ in range(2))
    managed.model.load_state_dict(plain.model.state_dict())
    live(plain)
    torch.manual_seed(4)
    managed.run = manage(managed.model, managed.optimizer, host_bytes=2**20)
    live(managed)
    twins.compare(plain, managed)


def test_files_have_the_models_size_and_bits(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        life.evict()
        weights_bytes = sum(p.nbytes for p in life.params)
        values: list[tuple[Any, int]] = [
            (life.model, 1), (life.model.state_dict(), 1), (life.optimizer.state_dict(), 2)
        ]  # fmt: skip
        for value, copies in values:
            file = io.BytesIO()
            torch.save(value, file)
            assert file.tell() < copies * weights_bytes + 64 * 1024
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
            life.note(loaded.state_dict() if isinstance(loaded, nn.Module) else loaded)
        file = io.BytesIO()
        torch.save(life.params[0], file)
        assert file.tell() < life.params[0].nbytes + 8 * 1024

    twins(live)


def test_load_state_dict_of_both_in_mid_run(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        weights = {k: v.clone() for k, v in life.model.state_dict().items()}
        state = copy.deepcopy(life.optimizer.state_dict())
        life.steps(3)
        life.evict()
        life.model.load_state_dict(weights)
        life.optimizer.load_state_dict(state)
        life.steps(3)

    twins(live)


def test_assign_true_is_refused_by_name(manage: Manager, twins: Twins) -> None:
    life = twins.start(lambda: nn.Linear(64, 8), torch.optim.AdamW)
    manage(life.model, life.optimizer)
    life.steps(1)
    life.model.load_state_dict(nn.Linear(64, 8).state_dict(), assign=True)
    with pytest.raises(OffloadError, match=r"weight is not the Parameter that was wrapped.*again"):
        life.steps(1)
