"""Each promise on the device tier: on a GPU, and the same test on the emulated device.

P1 has tests of its own in test_gpu.py (its emulated twin: test_frames.py), and what only CUDA has
(streams, pinning, capture) is there and in test_cuda_order.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.config import Tuning
from offload.outgoing import Outgoing, Reads
from offload.steps import Kind
from offload.tiers.arena import DeviceArena, PageMemory
from offload.tiers.copy import PlainCopier
from offload.tiers.lane import ThreadLane
from offload.tiers.spec import MIB, Machine
from offload.track import RETIMED_AFTER

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = pytest.mark.filterwarnings("ignore:.*determinis")
MACHINE = Machine(2e9, 2e9, 1e9, 1e9, 8e9, 2e10)
HOST = "80MiB"  # staging for a GPU is 48


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where weights are computed with."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


def mlp(layers: int = 6, width: int = 128) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


class Run:
    """A wrapped model with its optimizer and a loop."""

    def __init__(self, place: str, folder: Path, model: nn.Module | None = None,
                 **options: Any) -> None:  # fmt: skip
        self.model = model or mlp()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        tuning = Tuning(device_chunk_bytes=80 * 1024, machine=MACHINE, poison=True, residents=False)
        given: dict[str, Any] = {"device_memory": "300KiB", "host_memory": HOST, "tuning": tuning,
                                 "disk": folder}  # fmt: skip
        offload.wrap(self.model, self.optimizer, device=place, **(given | options))
        self.run = offload.runtime(self.model)
        device = self.run.parts.device
        assert device is not None
        self.device = device

    def loss(self, seed: int, rows: int = 8) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        loss: Tensor = self.model(torch.randn(rows, 128, generator=generator)).square().mean()
        return loss

    def steps(self, count: int, first: int = 0) -> list[float]:
        losses = []
        for seed in range(first, first + count):
            loss = self.loss(seed)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def close(self) -> None:
        self.run.close()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def start(place: str, tmp_path: Path) -> Iterator[Any]:
    """Starts runs that are closed after the test."""
    opened: list[Run] = []

    def make(**options: Any) -> Run:
        folder = tmp_path / f"spill{len(opened)}"
        opened.append(Run(place, folder, **options))
        return opened[-1]

    yield make
    for run in opened:
        run.close()


def test_p1_budgets_change_no_bit(start: Any) -> None:
    roomy, tight = start(device_memory="4MiB"), start(device_memory="220KiB")
    assert roomy.steps(6) == tight.steps(6)
    assert same(roomy.weights(), tight.weights())
    assert tight.device.engine.counters.evictions > 20


def test_p1_homes_that_never_move_change_no_bit(start: Any) -> None:
    """Without a disk a GPU reads and writes homes by itself."""
    moving, still = start(), start(disk=None)
    assert moving.steps(6) == still.steps(6)
    assert same(moving.weights(), still.weights())
    pinned = [run.run.stats()["device"]["pinned_bytes"] for run in (moving, still)]
    homes = sum(r.layout.total_elements * r.itemsize for f in still.run.parts.binding.families
                for r in (f.weights, f.grads))  # fmt: skip
    assert pinned[1] - pinned[0] == (homes if still.device.place.type == "cuda" else 0)


def test_p2_refusals_name_the_tier_and_what_works(start: Any) -> None:
    with pytest.raises(offload.BudgetError, match="device tier") as caught:
        start(device_memory="60KiB")
    assert caught.value.smallest_bytes > caught.value.given_bytes
    run = start(device_memory="300KiB")
    before, state = run.weights(), torch.get_rng_state()
    with pytest.raises(offload.BudgetError, match="device tier"):
        run.loss(0, rows=4096)
    assert same(before, run.weights())
    assert torch.equal(state, torch.get_rng_state())
    run.steps(2)


def test_p2_replayed_steps_make_no_frames_where_there_is_room(start: Any) -> None:
    run = start(device_memory="2MiB")
    run.steps(5)
    memory, made = run.device.engine.frames.pool.memory, list[int]()
    allocate = memory.allocate

    def noted(size_bytes: int) -> int:
        made.append(size_bytes)
        return int(allocate(size_bytes))

    memory.allocate = noted
    run.steps(3, first=5)
    assert made == []


def test_p2_the_account_is_within_the_budget_and_ends_empty(start: Any) -> None:
    run = start()
    run.steps(6)
    ledger = run.device.engine.ledger
    assert 0 < ledger.peak_bytes <= ledger.budget_bytes
    assert ledger.other_bytes == 0
    assert run.run.parts.engine.ledger.other_bytes == 0


def test_p2_generation_takes_its_rows_room_where_it_computes(
    place: str, zoo: Any, tmp_path: Path
) -> None:
    model = zoo.build("llama").eval()
    model.generation_config.eos_token_id = None
    offload.wrap(model, device=place, device_memory="1MiB", host_memory=HOST, disk=tmp_path)
    run, held = offload.runtime(model), list[int]()
    device = run.parts.device
    assert device is not None
    ledger, host = device.engine.ledger, run.parts.engine.ledger
    rows = run.generate(
        [[3, 4, 5], [6, 7]], 4, on_step=lambda _: held.append(ledger.other_bytes - host.other_bytes)
    )
    assert [len(row.tokens) for row in rows] == [4, 4]
    assert min(held) > 0, "debited on the host, where they are not"
    assert ledger.other_bytes == host.other_bytes == 0
    run.close()


def test_p3_what_users_touch_between_passes_is_right(start: Any) -> None:
    one, other = start(), start(device_memory="4MiB")
    for run in (one, other):
        run.steps(3)
        loss = run.loss(7)
        for p in run.model.parameters():
            p.data.mul_(0.5)
            assert p.device.type == "cpu"
        loss.backward()
        assert all(p.grad is not None and p.grad.device.type == "cpu"
                   for p in run.model.parameters())  # fmt: skip
        run.optimizer.step()
    assert same(one.weights(), other.weights())


def test_p3_hooks_of_the_users_see_gradients_that_are_there(start: Any) -> None:
    """Registered before ``wrap``: they come before our own, and must not see bytes to come."""

    def norms(**options: Any) -> list[float]:
        model, seen = mlp(), list[float]()
        for p in model.parameters():
            p.register_hook(lambda grad: seen.append(float(grad.norm())))
        start(model=model, **options).steps(3)
        return seen

    found = norms()
    assert all(value == value and value > 0 for value in found)
    assert found == norms(device_memory="4MiB")


def test_only_gradients_that_nobody_reads_earlier_leave_late() -> None:
    lane = ThreadLane("d2h", 1)
    outgoing, reads = Outgoing(PlainCopier(), lane, lambda *_: None, lambda _: None), Reads()
    param, grad = nn.Parameter(torch.zeros(4, 4)), torch.ones(4, 4)

    def may(grad: Tensor = grad) -> bool:
        return outgoing.may_send(param, grad, reads)

    with torch.no_grad():
        once = reads.note(param, again=False)
        rerun = reads.note(param, again=True)
        assert may()
        twice = reads.note(param, again=False)
        assert not may(), "autograd adds up the gradients of two uses"
        del twice
        assert may()
        assert not may(torch.ones(4, 8)[:, ::2])
        handle = param.register_hook(lambda grad: None)
        assert not may(), "a hook of the user's sees it first"
        handle.remove()
        with torch.enable_grad():
            assert not may(), "it has gradients itself"
        with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
            assert not may(), "all gradients are looked at"
        there = outgoing.send(param, grad)
        assert not may(), "another one is on its way"
        outgoing.wait(param)
        assert torch.equal(there, grad)
        assert may()
    del once, rerun
    lane.close()


def test_p3_an_exception_in_mid_step_leaves_everything_usable(start: Any) -> None:
    plain, hit = start(), start()
    plain.steps(4)

    def fail(grad: Tensor) -> None:
        raise ValueError("on purpose")

    hit.steps(2)
    handle = hit.model[3].weight.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        hit.loss(2).backward()
    handle.remove()
    hit.optimizer.zero_grad()
    hit.loss(9)
    assert hit.device.outgoing.sent_bytes == 0
    hit.steps(2, first=2)
    assert same(plain.weights(), hit.weights())
    assert hit.device.engine.ledger.other_bytes == 0


def test_p4_the_bound_is_known(start: Any) -> None:
    run = start()
    run.steps(6)
    forecast = run.device.stats(Kind.TRAIN)["forecast"]
    assert 0 < forecast["bound_s"] <= forecast["step_s"]
    stats = run.run.stats()
    assert stats["bound_s"] > 0
    assert stats["device"]["uploaded_bytes"] > 0


def test_p4_moments_are_timed_with_the_work_done(start: Any) -> None:
    """While they are learnt; a GPU's call returns before its work does."""
    run = start()
    waits, memory = [0], run.device.engine.frames.pool.memory
    wait = memory.wait

    def counted() -> None:
        waits[0] += 1
        wait()

    memory.wait = counted
    learnt = RETIMED_AFTER[-1] + 1
    run.steps(learnt)
    learning = waits[0]
    run.steps(3, first=learnt)
    assert learning > 20
    assert waits[0] == learning


def test_p4_a_report_without_a_disk_can_be_drawn(place: str, tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    offload.wrap(model, optimizer, device=place, device_memory="300KiB", host_memory=HOST)
    for _ in range(5):
        model(torch.ones(8, 128)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    offload.runtime(model).report(tmp_path / "report.html")
    offload.runtime(model).report(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["step"]["bound_s"] > 0
    assert data["verdict"]["binding"] in ("link", "compute")
    assert "its bound of" in data["verdict"]["text"]
    offload.runtime(model).close()


def test_p5_a_checkpoint_goes_on_bit_by_bit(start: Any, tmp_path: Path) -> None:
    whole, first, second = start(), start(), start(device_memory="220KiB")
    losses = whole.steps(6)
    assert first.steps(3) == losses[:3]
    first.run.save(tmp_path / "saved")
    second.run.load(tmp_path / "saved")
    assert second.steps(3, first=3) == losses[3:]
    assert same(whole.weights(), second.weights())


def test_p5_a_copy_that_fails_is_an_error(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start()
    run.steps(2)
    copier = run.device.outgoing._copier
    before, download = run.weights(), type(copier).download

    def broken(self: Any, *args: Any) -> None:
        raise OSError("the bus is gone")

    monkeypatch.setattr(type(copier), "download", broken)
    with pytest.raises(OSError, match="the bus is gone"):
        run.loss(2).backward()
    monkeypatch.setattr(type(copier), "download", download)
    assert same(before, run.weights())
    run.optimizer.zero_grad()
    run.steps(2, first=2)


def test_p6_nothing_has_to_be_told(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    offload.wrap(model, optimizer, device=place)
    for _ in range(3):
        model(torch.ones(8, 128)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    said = capsys.readouterr().err
    assert "device_memory=" in said
    assert "host_memory=" in said
    offload.runtime(model).close()


def test_an_allocator_that_is_full_is_given_the_idle_frames() -> None:
    """What others took of the device is not in our account."""

    class Small(PageMemory):
        left = 4096

        def allocate(self, size_bytes: int) -> int:
            if size_bytes > self.left:
                raise MemoryError("out of memory")
            self.left -= size_bytes
            return super().allocate(size_bytes)

        def free(self, address: int, size_bytes: int) -> None:
            self.left += size_bytes
            super().free(address, size_bytes)

    arena = DeviceArena(Small())
    arena.give(arena.take(3072))
    frame = arena.take(2048)
    assert (arena.total_bytes, arena.idle_bytes) == (2048, 0)
    with pytest.raises(MemoryError):
        arena.take(4 * MIB)
    arena.give(frame)
    arena.close()
