"""``step_in_backward``: the same bits, less to move, and no silent surprise."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.activations import find_units
from offload.bind import storage_order
from offload.config import Tuning
from offload.run import Runtime
from offload.steps import Kind
from offload.tiers.spec import Machine

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

HOST_BYTES = 720 * 1024
STEPS = 5


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(
    model: Any, optimizer: torch.optim.Optimizer, run: Runtime | None = None, micro: int = 1
) -> list[Any]:
    """Losses and final weights; a scheduler moves the learning rate between steps."""
    generator = torch.Generator().manual_seed(1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    seen: list[Any] = []
    for _ in range(STEPS):
        for i in range(micro):
            x = torch.randint(0, 192, (2, 12), generator=generator)
            loss = model(input_ids=x, labels=x).loss
            last = i == micro - 1
            with nullcontext() if run is None or last else run.accumulating():
                loss.backward()
            seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return [*seen, {k: v.clone() for k, v in model.state_dict().items()}]


def is_active(run: Runtime) -> bool:
    early = run.parts.early
    return early is not None and early.active


@pytest.mark.parametrize("adversary", [None, 3])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize(
    ("name", "recompute"),
    [("llama", "off"), ("llama-tied", "off"), ("llama", "non-reentrant"), ("gpt2", "reentrant"),
     ("t5", "off"), ("mixtral", "off")],
)  # fmt: skip
def test_same_bits(
    name: str, recompute: str, micro: int, adversary: int | None, zoo: Zoo, manage: Manager
) -> None:
    plain = zoo.build(name, recompute)
    torch.manual_seed(2)
    reference = train(plain, adamw(plain), micro=micro)
    model = zoo.build(name, recompute)
    optimizer = adamw(model)
    run = manage(
        model, optimizer, host_bytes=HOST_BYTES, adversary=adversary, step_in_backward=True
    )
    torch.manual_seed(2)
    assert zoo.same(train(model, optimizer, run, micro), reference)
    assert is_active(run)
    assert run.parts.engine.counters.evictions > 10
    assert run.parts.engine.ledger.peak_bytes <= HOST_BYTES
    assert run.parts.engine.ledger.other_bytes == 0


def test_gradients_never_touch_the_disk(zoo: Zoo, manage: Manager) -> None:
    moved = {}
    for early in (False, True):
        model = zoo.build("llama")
        optimizer = adamw(model)
        run = manage(model, optimizer, host_bytes=HOST_BYTES, step_in_backward=early)
        train(model, optimizer, run)
        step_bytes = run.stats()["step_bytes"]
        moved[early] = step_bytes["read"] + step_bytes["write"]
        weight_bytes = 4 * sum(p.numel() for p in model.parameters())
    assert moved[True] < moved[False] - weight_bytes / 2  # plans differ with recorded times
    trace = run.parts.steps.tracks[Kind.TRAIN].trace
    assert trace is not None
    touched = {n.chunk for m in trace.moments for n in m.needs}
    grads = {c for h in run.parts.binding.homes.values() for c in h.grad_chunks}
    assert not touched & grads


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_block_begins_with_its_vectors(name: str, zoo: Zoo, manage: Manager) -> None:
    """Else the first norm's gradient, a block's last, holds up what shares a chunk with it."""
    model = zoo.build(name)
    registered, units = dict(model.named_parameters()), list(find_units(model))
    order = [n for n, _ in storage_order(model, units)]
    assert len(units) > 1
    assert order != list(registered)
    assert storage_order(model, []) == list(registered.items())

    def block(name: str) -> str:
        return next((u for u in units if name.startswith(f"{u}.")), "")

    for part in ("", *units):  # nothing leaves its block, and equals keep their order
        mine = [n for n in registered if block(n) == part]
        if part:
            mine.sort(key=lambda n: registered[n].dim() > 1)
        assert [n for n in order if block(n) == part] == mine
    assert list(map(block, order)) == list(map(block, registered))
    run = manage(model, adamw(model), host_bytes=HOST_BYTES, step_in_backward=True)
    assert [n for family in run.parts.binding.families for n in family.names] == order


def test_on_the_framed_path(zoo: Zoo, tmp_path: Path) -> None:
    plain = zoo.build("llama")
    reference = train(plain, adamw(plain))
    model = zoo.build("llama")
    optimizer = adamw(model)
    how = Tuning(
        chunk_bytes=16384, device_chunk_bytes=24 * 1024, poison=True, adversary=5,
        machine=Machine(2e9, 2e9, 1e9, 1e9, 8e9, 8e9),
    )  # fmt: skip
    offload.wrap(
        model, optimizer, device="emulated", device_memory="420KiB", host_memory="700KiB",
        disk=tmp_path, step_in_backward=True, tuning=how,
    )  # fmt: skip
    with offload.runtime(model) as run:
        assert zoo.same(train(model, optimizer, run), reference)
        assert is_active(run)


def step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 192, (2, 12), generator=generator)
    loss: Tensor = model(input_ids=x, labels=x).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.fixture
def early(zoo: Zoo, manage: Manager) -> Any:
    """A llama whose next backward pass updates."""
    model: Any = zoo.build("llama")
    optimizer = adamw(model)
    run = manage(model, optimizer, host_bytes=HOST_BYTES, step_in_backward=True)
    step(model, optimizer, 0)
    assert is_active(run)
    return model, optimizer, run


def backward(model: Any) -> None:
    x = torch.arange(12)[None]
    model(input_ids=x, labels=x).loss.backward()


def test_a_second_backward_pass_is_refused(early: Any) -> None:
    model, _, _ = early
    backward(model)
    with pytest.raises(offload.OffloadError, match=r"received a second gradient.*accumulating"):
        backward(model)


def test_changed_learning_rate_is_refused(early: Any) -> None:
    model, optimizer, _ = early
    backward(model)
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(offload.OffloadError, match=r"param_groups\[0\] lr changed after"):
        optimizer.step()


def test_between_steps_nothing_is_saved_and_a_load_starts_over(early: Any, tmp_path: Path) -> None:
    model, optimizer, run = early
    run.save(tmp_path / "good")
    expected = [step(model, optimizer, 1), step(model, optimizer, 2)]
    run.load(tmp_path / "good")
    handle = model.model.layers[0].self_attn.q_proj.weight.register_hook(_raise)
    with pytest.raises(ValueError, match="on purpose"):
        backward(model)
    handle.remove()
    with pytest.raises(offload.OffloadError, match="not finished"):
        run.save(tmp_path / "bad")
    run.load(tmp_path / "good")
    assert [step(model, optimizer, 1), step(model, optimizer, 2)] == expected
    assert run.parts.engine.ledger.other_bytes == 0


def _raise(grad: Tensor) -> None:
    raise ValueError("on purpose")


def test_clipping_keeps_the_update_where_it_was(
    zoo: Zoo, manage: Manager, capsys: pytest.CaptureFixture[str]
) -> None:
    model = zoo.build("llama")
    run = manage(model, adamw(model), max_grad_norm=1.0, step_in_backward=True)
    assert not is_active(run)
    assert "the update waits for the norm" in capsys.readouterr().err


class Odd(nn.Module):
    """One weight that is used now and then, one in two reentrant segments, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(32, 64)
        self.often = nn.Linear(64, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12))
        self.rare = nn.Parameter(torch.randn(64) / 8)
        self.never = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor, rare: bool) -> Tensor:
        x = self.inp(x)
        for layer in self.layers[:6]:
            x = torch.tanh(layer(x))
        for _ in range(2):
            x = checkpoint(self.often, x, use_reentrant=True)
        for layer in self.layers[6:]:
            x = torch.tanh(layer(x))
        return x * self.rare if rare else x


def live(model: Odd, optimizer: torch.optim.Optimizer) -> list[Any]:
    seen: list[Any] = []
    for i in range(6):
        generator = torch.Generator().manual_seed(i)
        loss = model(torch.randn(4, 32, generator=generator), rare=i in (2, 5)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return [*seen, {k: v.clone() for k, v in model.state_dict().items()}]


def test_weights_without_exactly_one_gradient_are_left_to_step(zoo: Zoo, manage: Manager) -> None:
    torch.manual_seed(0)
    plain = Odd()
    torch.manual_seed(0)
    model = Odd()
    reference = live(plain, adamw(plain))
    optimizer = adamw(model)
    run = manage(model, optimizer, host_bytes=400 * 1024, step_in_backward=True)
    assert zoo.same(live(model, optimizer), reference)
    assert is_active(run)


def test_accumulation_without_telling_is_found_out_in_the_first_step(
    zoo: Zoo, manage: Manager, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = zoo.build("llama")
    reference = zoo.train("llama", plain, adamw(plain), steps=3)
    model = zoo.build("llama")
    optimizer = adamw(model)
    run = manage(model, optimizer, host_bytes=HOST_BYTES, step_in_backward=True)
    assert zoo.same(zoo.train("llama", model, optimizer, steps=3), reference)
    assert not is_active(run)
    assert "several gradients in one step" in capsys.readouterr().err
