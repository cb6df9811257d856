"""Weights that live on the device because it has room: numbers, traffic, memory, user code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from tests.framed import adamw, tuning
from tests.resident import Run, loss_of, mlp, same, train, weights

STEPS = 5
ROOM = {"some": "1500KiB", "all": "64MiB"}


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "no disk"])
@pytest.mark.parametrize("memory", ROOM)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "mixtral"])
def test_training_has_the_bits_of_the_unwrapped_run(
    name: str, memory: str, disk: bool, zoo: Any, tmp_path: Path
) -> None:
    plain = zoo.build(name)
    reference = zoo.train(name, plain, adamw(plain), steps=STEPS)
    model = zoo.build(name)
    optimizer = adamw(model)
    run = Run(model, tmp_path if disk else None, ROOM[memory], optimizer,
              "1MiB" if disk else "64MiB")  # fmt: skip
    assert zoo.same(zoo.train(name, model, optimizer, steps=STEPS), reference)
    assert run.resident_bytes > 0
    assert run.device.residents is not None
    assert run.device.residents.complete is (memory == "all")
    run.check_budgets()
    run.runtime.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"step_in_backward": True}, {"max_grad_norm": 0.01}, {"compute_dtype": torch.bfloat16}],
    ids=["plain", "in backward", "clipped", "bf16"],
)
def test_ways_to_update_and_compute_have_the_bits_of_no_residents(
    options: dict[str, Any], tmp_path: Path
) -> None:
    outcomes = []
    for residents in (False, True):
        model = mlp()
        optimizer = adamw(model)
        how = tuning(residents=residents)
        offload.wrap(model, optimizer, device="emulated", device_memory="1200KiB",
                     host_memory="1MiB", disk=tmp_path, tuning=how, **options)  # fmt: skip
        losses = train(model, optimizer, range(STEPS))
        run = offload.runtime(model)
        assert (run.stats()["tiers"]["device"]["resident_bytes"] > 0) is residents
        outcomes.append((losses, weights(model)))
        run.close()
    assert outcomes[0][0] == outcomes[1][0]
    assert same(outcomes[0][1], outcomes[1][1])


def test_what_lives_there_crosses_no_bus(tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer)
    train(model, optimizer, range(3))
    before = run.uploaded()
    train(model, optimizer, range(3, 6))
    assert run.uploaded() == before
    stats = run.runtime.stats()
    assert stats["device"]["downloaded_bytes"] <= sum(p.nbytes for p in model.parameters())
    run.runtime.close()


def test_homes_of_residents_are_not_kept_in_memory(tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer, host="8MiB")
    train(model, optimizer, range(3))
    host = run.runtime.parts.engine
    written = host.space.lanes["write"].meter.moved_bytes
    held = [host.space.chunks[c] for c in host.space.held()]
    assert not held
    train(model, optimizer, range(3, 6))
    assert host.space.lanes["write"].meter.moved_bytes == written
    run.runtime.close()


def test_writes_of_the_user_are_honoured(tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer, compute_dtype=torch.bfloat16)
    train(model, optimizer, range(3))
    with torch.no_grad():
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            b.copy_(a)
            a.data.mul_(0.5)
            b.data.mul_(0.5)
        x = torch.randn(4, 128)
        got, want = model(x), plain.bfloat16()(x.bfloat16())
    assert run.resident_bytes > 0
    assert torch.equal(got, want)
    run.runtime.close()


def test_frozen_weights_come_for_inference(tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    run = Run(model, tmp_path, "1MiB")
    x = torch.randn(4, 128)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(x), plain(x))
        assert run.resident_bytes > 0
        before = run.uploaded()
        model(x)
    assert run.uploaded() == before
    run.runtime.close()


def test_gradients_that_were_kept_stay_right(tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    reference, optimizer = adamw(plain), adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer)
    for which, opt in ((model, optimizer), (plain, reference)):
        for seed in range(4):
            loss_of(which, seed).backward()
            loss_of(which, seed + 10).backward()
            opt.step()
            if seed % 2:
                opt.zero_grad()
    assert run.resident_bytes > 0
    assert same(weights(model), weights(plain))
    run.runtime.close()


@pytest.mark.parametrize("memory", ["1200KiB", "64MiB"])
def test_nothing_of_them_is_at_home(memory: str, tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, memory, optimizer)
    train(model, optimizer, range(4))
    loss_of(model, 4).backward()
    space, residents = run.runtime.parts.engine.space, run.runtime.parts.binding.residents
    assert residents
    for param in residents:
        assert param.grad is not None
        for tensor in (param, param.grad, *optimizer.state[param].values()):
            assert not space.chunks_at(tensor.data_ptr(), tensor.nbytes)
    run.runtime.close()


def test_their_gradients_need_no_room_on_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = adamw(model)
    run = Run(model, tmp_path, "64MiB", optimizer)
    train(model, optimizer, range(4))
    taken: list[object] = []
    monkeypatch.setattr(run.runtime.parts.engine, "take_other", lambda *a: taken.append(a))
    loss_of(model, 4).backward()
    assert not taken
    run.runtime.close()


def test_the_optimizer_steps_by_itself_where_its_temporaries_fit(tmp_path: Path) -> None:
    for memory, fused, expected in (
        ("64MiB", False, True), ("2600KiB", False, False), ("2600KiB", True, True)
    ):  # fmt: skip
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        run = Run(model, tmp_path, memory, optimizer)
        train(model, optimizer, range(3))
        assert run.device.residents is not None
        assert run.device.residents.complete
        assert run.device.may_update_at_once(optimizer) is expected
        run.runtime.close()


def test_they_are_no_activations(tmp_path: Path) -> None:
    held = []
    for residents in (False, True):
        model = mlp()
        optimizer = adamw(model)
        how = tuning(residents=residents)
        offload.wrap(model, optimizer, device="emulated", device_memory="1200KiB",
                     host_memory="1MiB", disk=tmp_path, tuning=how)  # fmt: skip
        train(model, optimizer, range(4))
        run = offload.runtime(model)
        device = run.parts.device
        assert device is not None
        assert (run.stats()["tiers"]["device"]["resident_bytes"] > 0) is residents
        loss = loss_of(model, 5)
        held.append(device.engine.ledger.other_bytes)
        del loss
        run.close()
    assert held[0] == held[1] > 0
