"""Weights that live on the device because it has room: numbers, room, aliases, and the way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.device_engine import Device
from offload.errors import BudgetError
from offload.tiers.spec import KIB, MIB
from tests.framed import adamw, tuning

STEPS = 5
ROOM = {"some": "1500KiB", "all": "64MiB"}


class Run:
    """A wrapped model with residents, and what its device holds."""

    def __init__(
        self, model: Any, folder: Path | None, memory: str, optimizer: Any = None,
        host: str = "1MiB", **options: Any,
    ) -> None:  # fmt: skip
        how = tuning(residents=True)
        given: dict[str, Any] = {"device": "emulated", "device_memory": memory, "host_memory": host}
        offload.wrap(model, optimizer, disk=folder, tuning=how, **(given | options))
        self.runtime = offload.runtime(model)
        device = self.runtime.parts.device
        assert device is not None
        self.device: Device = device

    @property
    def resident_bytes(self) -> int:
        found: int = self.runtime.stats()["tiers"]["device"]["resident_bytes"]
        return found

    def uploaded(self) -> int:
        found: int = self.runtime.stats()["device"]["uploaded_bytes"]
        return found

    def check_budgets(self) -> None:
        for ledger in (self.runtime.parts.engine.ledger, self.device.engine.ledger):
            assert ledger.peak_bytes <= ledger.budget_bytes


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


def mlp(layers: int = 8, width: int = 128) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def loss_of(model: nn.Module, seed: int, rows: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    loss: Tensor = model(torch.randn(rows, 128, generator=generator)).square().mean()
    return loss


def train(model: nn.Module, optimizer: Any, steps: range, rows: int = 8, clip: bool = False) -> Any:
    losses = []
    for seed in steps:
        loss = loss_of(model, seed, rows)
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


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


def test_they_can_be_refused(tmp_path: Path) -> None:
    model = mlp()
    optimizer = adamw(model)
    offload.wrap(model, optimizer, device="emulated", device_memory=64 * MIB,
                 host_memory=1024 * KIB, disk=tmp_path, tuning=tuning(residents=False))  # fmt: skip
    train(model, optimizer, range(3))
    run = offload.runtime(model)
    assert run.stats()["tiers"]["device"]["resident_bytes"] == 0
    run.close()


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
