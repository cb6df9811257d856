"""Weights that come to live on the device, and go home: when, and what moves with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.errors import BudgetError
from offload.internals import TorchDispatchMode
from offload.tiers.spec import KIB, MIB
from tests.framed import adamw, tuning
from tests.resident import Run, loss_of, mlp, same, train, weights

STEPS = 5


def test_a_held_alias_keeps_its_weight_at_home(tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer)
    layer: Any = model[2]
    array = layer.weight.detach().numpy()
    train(model, optimizer, range(STEPS))
    assert run.resident_bytes > 0
    assert run.device.residents is not None
    assert not run.device.residents.complete
    assert torch.equal(torch.from_numpy(array), layer.weight)
    array[:] = 0.5
    with torch.no_grad():
        out = model(torch.zeros(1, 128))
    layer.weight.data.fill_(0.5)
    with torch.no_grad():
        assert torch.equal(model(torch.zeros(1, 128)), out)
    run.runtime.close()


def test_a_larger_batch_sends_weights_home(tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    reference, optimizer = adamw(plain), adamw(model)
    run = Run(model, tmp_path, "2600KiB", optimizer)
    losses = train(model, optimizer, range(3))
    there = run.resident_bytes
    losses += train(model, optimizer, range(3, 6), rows=300)
    assert 0 < run.resident_bytes < there
    losses += train(model, optimizer, range(6, 8))
    wanted = train(plain, reference, range(3)) + train(plain, reference, range(3, 6), rows=300)
    assert losses == wanted + train(plain, reference, range(6, 8))
    assert same(weights(model), weights(plain))
    run.check_budgets()
    run.runtime.close()


def test_what_does_not_fit_even_so_is_refused(tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "2600KiB", optimizer)
    train(model, optimizer, range(3))
    before = weights(model)
    with pytest.raises(BudgetError, match="device tier"):
        loss_of(model, 9, rows=4000)
    assert same(weights(model), before)
    train(model, optimizer, range(3, 6))
    run.check_budgets()
    run.runtime.close()


def test_a_checkpoint_holds_them_and_goes_back_into_them(tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    reference, optimizer = adamw(plain), adamw(model)
    run = Run(model, tmp_path, "1200KiB", optimizer)
    train(model, optimizer, range(3))
    run.runtime.save(tmp_path / "saved")
    train(model, optimizer, range(3, 5))
    assert run.resident_bytes > 0
    run.runtime.load(tmp_path / "saved")
    train(model, optimizer, range(3, 7))
    train(plain, reference, range(7))
    assert same(weights(model), weights(plain))
    run.runtime.close()


@pytest.mark.parametrize("end", ["close", "unwrap"])
def test_they_come_home_when_the_run_ends(end: str, tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    reference, optimizer = adamw(plain), adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer)
    train(model, optimizer, range(3))
    assert run.resident_bytes > 0
    getattr(run.runtime, end)()
    train(model, optimizer, range(3, 5))
    train(plain, reference, range(5))
    assert same(weights(model), weights(plain))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_optimizer_takes_over_a_model_with_residents(mode: Any, tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    run = Run(model, tmp_path, "2MiB")
    with mode():
        for _ in range(3):
            model(torch.randn(4, 128))
    assert run.resident_bytes > 0
    optimizer, reference = adamw(model), adamw(plain)
    offload.wrap(model, optimizer, tuning=tuning(residents=True))
    train(model, optimizer, range(STEPS))
    train(plain, reference, range(STEPS))
    assert same(weights(model), weights(plain))
    offload.runtime(model).close()


def test_they_can_be_refused(tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    offload.wrap(model, optimizer, device="emulated", device_memory=64 * MIB,
                 host_memory=1024 * KIB, disk=tmp_path, tuning=tuning(residents=False))  # fmt: skip
    train(model, optimizer, range(3))
    run = offload.runtime(model)
    assert run.stats()["tiers"]["device"]["resident_bytes"] == 0
    run.close()


def test_what_was_sent_home_stays_there(tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "1200KiB", optimizer)
    train(model, optimizer, range(3))
    assert run.resident_bytes > 0
    train(model, optimizer, range(2), rows=200)
    assert run.resident_bytes == 0
    uploads = []
    for rows in (8, 200, 8, 200, 8):
        train(model, optimizer, range(3), rows=rows)
        uploads.append(run.resident_bytes)
    assert not any(uploads)
    run.runtime.close()


@pytest.mark.parametrize("trust", [False, True])
def test_frames_of_before_make_room(trust: bool, tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    offload.wrap(model, optimizer, device="emulated", device_memory="2500KiB", host_memory="1MiB",
                 disk=tmp_path, tuning=tuning(residents=True, trust_versions=trust))  # fmt: skip
    run = offload.runtime(model)
    device = run.parts.device
    assert device is not None
    ledger, pool = device.engine.ledger, device.engine.frames.pool
    train(model, optimizer, range(1))
    held = pool.total_bytes
    assert held > 0
    train(model, optimizer, range(1, 4))
    assert run.stats()["tiers"]["device"]["resident_bytes"] + held > ledger.budget_bytes
    assert ledger.used_bytes <= ledger.peak_bytes <= ledger.budget_bytes
    run.close()


@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_state_goes_straight_into_its_home(name: str, tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    make = getattr(torch.optim, name)
    reference, optimizer = make(plain.parameters(), lr=1e-2), make(model.parameters(), lr=1e-2)
    run = Run(model, tmp_path, "64MiB", optimizer)
    losses = train(model, optimizer, range(4))
    assert run.resident_bytes > 0
    made: list[int] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func._overloadpacket in (torch.ops.aten.empty_like, torch.ops.aten.clone):
                made.append(result.nbytes)
            return result

    with Watching():
        run.runtime.bring_home()
    assert not made
    space = run.runtime.parts.engine.space
    for param in model.parameters():
        for value in optimizer.state[param].values():
            if value.shape == param.shape and name == "AdamW":
                assert space.chunks_at(value.data_ptr(), value.nbytes)
    losses += train(model, optimizer, range(4, 6))
    assert losses == train(plain, reference, range(6))
    assert same(weights(model), weights(plain))
    run.runtime.close()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_evaluation_may_be_what_they_come_in(dtype: Any, tmp_path: Path) -> None:
    """In inference mode, whose tensors cannot be trained."""
    outcomes = []
    for residents in (False, True):
        model = mlp()
        optimizer = adamw(model)
        offload.wrap(model, optimizer, device="emulated", device_memory="64MiB", disk=tmp_path,
                     host_memory="1MiB", compute_dtype=dtype,
                     tuning=tuning(residents=residents))  # fmt: skip
        run = offload.runtime(model)
        losses = train(model, optimizer, range(1))
        with torch.inference_mode():
            losses.append(loss_of(model, 7).item())
        held = run.stats()["tiers"]["device"]["resident_bytes"]
        assert (held > 0) is residents
        losses += train(model, optimizer, range(1, 4))
        outcomes.append((losses, weights(model)))
        run.close()
    assert outcomes[0][0] == outcomes[1][0]
    assert same(outcomes[0][1], outcomes[1][1])
