"""Weights computed with in frames: same bits as the unwrapped run, on an emulated device.

Frames are poisoned when freed and rotate, copies complete late and out of order, and both the
arena and the host are too small for the model, so every test runs all three tiers.
"""

from __future__ import annotations

import copy
import pickle
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import offload
from offload.config import Tuning
from offload.device_engine import Device
from offload.tiers.arena import DeviceArena, PageMemory
from offload.tiers.frames import Frame
from offload.tiers.spec import Machine

STEPS = 4
MACHINE = Machine(2e9, 2e9, 1e9, 1e9, 8e9, 8e9)


def tuning(seed: int | None = 5, **changes: Any) -> Tuning:
    values: dict[str, Any] = {
        "chunk_bytes": 16384, "device_chunk_bytes": 24 * 1024, "machine": MACHINE,
        "poison": True, "adversary": seed,
    }  # fmt: skip
    return Tuning(**(values | changes))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().train()


class Watched:
    """A wrapped model, and where its chunks went."""

    def __init__(
        self, model: Any, folder: Path, optimizer: torch.optim.Optimizer | None = None,
        memory: str = "420KiB", host: str = "500KiB", how: Tuning | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        options = {"device": "emulated", "device_memory": memory} | options
        offload.wrap(
            model, optimizer, host_memory=host, disk=folder, tuning=how or tuning(), **options
        )
        self.model = model
        self.optimizer = optimizer
        self.runtime = offload.runtime(model)
        self.doubles = 0  # uploads of a chunk of which an older copy was still in use
        self.places: defaultdict[int, list[int]] = defaultdict(list)
        arena, assign = self.device.engine.frames.pool, self.device.engine.frames.pool.assign

        def note(frame: Frame, owner: int) -> None:
            self.places[owner].append(frame.address)
            self.doubles += owner in (arena.owner_at(f.address) for f in arena.waiting)
            assign(frame, owner)

        arena.assign = note  # type: ignore[method-assign]

    @property
    def device(self) -> Device:
        device = self.runtime.parts.device
        assert device is not None
        return device

    def check_tiers(self) -> None:
        """All three tiers took part: chunks moved between frames, within budgets, from disk."""
        moved = [len(set(addresses)) for addresses in self.places.values()]
        assert sum(n > 1 for n in moved) > len(moved) // 2
        assert self.doubles == 0
        host, device = self.runtime.parts.engine, self.device.engine
        for ledger in (host.ledger, device.ledger):
            assert ledger.peak_bytes <= ledger.budget_bytes
        weights = sum(c.size_bytes for c in device.space.chunks)
        assert device.ledger.peak_bytes - device.ledger.peak_other_bytes < weights
        assert host.counters.demand_loads + host.counters.planned_loads > 20

    def close(self) -> None:
        self.runtime.close()
        arena = self.device.engine.frames.pool
        assert arena.total_bytes == arena.viewed_bytes


# name, recomputation: least device memory that works, and a little
MEMORY = {
    ("llama", "off"): "420KiB",
    ("llama", "reentrant"): "200KiB",
    ("llama", "non-reentrant"): "200KiB",
    ("llama-tied", "off"): "420KiB",
    ("gpt2", "off"): "540KiB",
    ("t5", "off"): "620KiB",
    ("vit", "off"): "200KiB",
    ("mixtral", "off"): "400KiB",
}


@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "planned"])
@pytest.mark.parametrize(("name", "recompute"), MEMORY)
def test_training_has_the_bits_of_the_unwrapped_run(
    name: str, recompute: str, prefetch: bool, zoo: Any, tmp_path: Path
) -> None:
    plain = zoo.build(name, recompute)
    reference = zoo.train(name, plain, adamw(plain), steps=STEPS)
    model = zoo.build(name, recompute)
    memory = MEMORY[name, recompute]
    watched = Watched(
        model, tmp_path, optimizer=adamw(model), memory=memory, how=tuning(prefetch=prefetch)
    )
    run = zoo.train(name, model, watched.optimizer, steps=STEPS)
    assert zoo.same(run, reference)
    watched.check_tiers()
    assert bool(watched.device.engine.counters.planned_loads) is prefetch
    watched.close()


def test_real_threads(zoo: Any, tmp_path: Path) -> None:
    plain = zoo.build("llama")
    reference = zoo.train("llama", plain, adamw(plain), steps=STEPS)
    model = zoo.build("llama")
    watched = Watched(model, tmp_path, optimizer=adamw(model), how=tuning(None))
    assert zoo.same(zoo.train("llama", model, watched.optimizer, steps=STEPS), reference)
    watched.check_tiers()
    watched.close()


class Odd(nn.Module):
    """Weights used in every way that is not ``nn.Linear``."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(192, 48)
        self.first = nn.Parameter(torch.randn(96, 48) / 7)
        self.second = nn.Parameter(torch.randn(96, 48) / 7)
        self.frozen = nn.Parameter(torch.randn(48, 48) / 7, requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.conv = nn.Conv1d(48, 48, 3, padding=1)
        self.norm = nn.BatchNorm1d(48)
        self.fail = False

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = self.emb(input_ids)
        x = torch.tanh(x @ self.first.t() @ self.second)
        x = x @ self.frozen
        if self.fail:
            raise ValueError("on purpose")
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x = checkpoint(self.inner, x, use_reentrant=False)
        x = torch.tanh(x @ self.first.t() @ self.second)
        logits = F.linear(x, self.emb.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + self.empty.sum()

    def inner(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(x @ self.second.t() @ self.first)


def live(model: Odd, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Training with accumulation and an evaluation between forward and backward."""
    generator = torch.Generator().manual_seed(1)
    seen: list[Any] = []
    for i in range(6):
        ids = torch.randint(0, 192, (2, 12), generator=generator)
        loss = model(ids, ids)
        model.eval()
        with torch.no_grad():
            seen.append(model(ids, ids))
        model.train()
        loss.backward()
        seen += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    return [*seen, {k: v.clone() for k, v in model.state_dict().items()}]


@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "planned"])
def test_odd_uses_of_weights(prefetch: bool, zoo: Any, tmp_path: Path) -> None:
    plain = seeded(Odd)
    reference = live(plain, adamw(plain))
    model = seeded(Odd)
    watched = Watched(
        model, tmp_path, optimizer=adamw(model), memory="150KiB", host="200KiB",
        how=tuning(prefetch=prefetch),
    )  # fmt: skip
    assert watched.optimizer is not None
    assert zoo.same(live(model, watched.optimizer), reference)
    watched.check_tiers()
    watched.close()


def test_exceptions_leave_everything_usable(zoo: Any, tmp_path: Path) -> None:
    plain = seeded(Odd)
    reference = live(plain, adamw(plain))
    model = seeded(Odd)
    watched = Watched(model, tmp_path, optimizer=adamw(model), memory="150KiB", host="200KiB")
    ids = torch.ones(2, 12, dtype=torch.long)
    model.fail = True
    for _ in range(2):
        with pytest.raises(ValueError, match="on purpose"):
            model(ids, ids)
        assert isinstance(model.first, nn.Parameter)
    model.fail = False
    handle = model.frozen.requires_grad_().register_hook(_raise)
    with pytest.raises(ValueError, match="in a hook"):
        model(ids, ids).backward()
    handle.remove()
    model.frozen.requires_grad_(False)
    assert isinstance(model.first, nn.Parameter)
    model.zero_grad()
    model.norm.reset_running_stats()
    assert watched.optimizer is not None
    assert zoo.same(live(model, watched.optimizer), reference)
    watched.close()


def _raise(grad: Tensor) -> None:
    raise ValueError("in a hook")


def test_weights_move_between_forward_and_backward(zoo: Any, tmp_path: Path) -> None:
    watched = Watched(zoo.build("llama"), tmp_path, how=tuning(prefetch=False))
    ids = torch.arange(1, 13)[None]
    loss = watched.model(input_ids=ids, labels=ids).loss
    before = {c: list(a) for c, a in watched.places.items()}
    loss.backward()
    again = [c for c, a in watched.places.items() if len(a) > len(before[c])]
    assert len(again) > 6
    assert any(watched.places[c][len(before[c])] != before[c][-1] for c in again)
    watched.close()


class Keeper(nn.Module):
    """Keeps a view of a weight from inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        first: Any = self.layers[0]
        self.kept.append(first.weight.detach().t())
        for layer in self.layers:
            out: Tensor = layer(x)
            x = torch.tanh(out)
        return x


def test_a_view_that_the_user_keeps_stays_what_it_was(tmp_path: Path) -> None:
    model = seeded(Keeper)
    watched = Watched(model, tmp_path, memory="120KiB")
    for _ in range(3):
        model(torch.ones(2, 64)).sum().backward()
    assert len({t.data_ptr() for t in model.kept}) == 3
    assert all(torch.equal(kept, model.layers[0].weight.t()) for kept in model.kept)
    arena = watched.device.engine.frames.pool
    assert arena.viewed_bytes > 0
    model.kept.clear()
    assert arena.viewed_bytes == 0
    watched.close()


def test_too_many_kept_views_are_refused(tmp_path: Path) -> None:
    model = seeded(Keeper)
    watched = Watched(model, tmp_path, memory="120KiB")
    with pytest.raises(offload.BudgetError, match="device_memory of at least"):
        _ = [model(torch.ones(2, 64)) for _ in range(20)]
    model.kept.clear()
    model(torch.ones(2, 64))
    watched.close()


def test_autograd_grad_and_double_backward(tmp_path: Path) -> None:
    def gradients(model: Any) -> list[Tensor]:
        x = torch.linspace(-1, 1, 64).expand(3, 64).clone().requires_grad_()
        params = list(model.parameters())
        first = torch.autograd.grad(model(x).square().sum(), [x, *params])
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        second = torch.autograd.grad(slope.square().sum(), params[:-1], allow_unused=True)
        return [*first, *(g for g in second if g is not None)]

    reference = gradients(seeded(Keeper))
    watched = Watched(seeded(Keeper), tmp_path, memory="200KiB")
    for _ in range(2):
        found = gradients(watched.model)
        watched.model.kept.clear()
        assert len(found) == len(reference)
        assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    assert all(p.grad is None for p in watched.model.parameters())
    assert watched.runtime.parts.engine.ledger.other_bytes == 0
    watched.close()


def test_hooks_and_gradients_are_on_the_parameters(tmp_path: Path) -> None:
    model = seeded(Keeper)
    fired: list[nn.Parameter] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(fired.append)
    watched = Watched(model, tmp_path, optimizer=adamw(model), memory="120KiB")
    model(torch.ones(2, 64)).sum().backward()
    model.kept.clear()
    assert {id(p) for p in fired} == {id(p) for p in model.parameters()}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in fired)
    watched.close()


@pytest.mark.parametrize("how", ["data", "version", "numpy"])
def test_writes_between_passes_are_honoured(how: str, tmp_path: Path) -> None:
    def write(p: nn.Parameter) -> None:
        if how == "data":
            p.data.mul_(0.5)
        elif how == "numpy":
            p.detach().numpy()[...] *= 0.5
        else:
            with torch.no_grad():
                p.mul_(0.5)

    def run(model: Any) -> tuple[list[Tensor], str]:
        seen, raised = [], ""
        for _ in range(3):
            y = model(torch.ones(2, 64))
            write(model.layers[3].weight)
            seen.append(y.detach())
            try:
                y.sum().backward()
            except RuntimeError as error:
                raised = str(error)
        return seen + [p.grad.clone() for p in model.parameters() if p.grad is not None], raised

    reference, why = run(seeded(Keeper))
    watched = Watched(seeded(Keeper), tmp_path, memory="200KiB")
    found, raised = run(watched.model)
    watched.model.kept.clear()
    assert len(found) == len(reference)
    assert all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))
    assert (
        ("modified by an inplace operation" in raised) == ("inplace" in why) == (how == "version")
    )
    watched.close()


class Twice(nn.Module):
    """Uses a weight twice, each use keeping a view of it for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.between = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        first = self.weight
        x = self.between(torch.tanh(x @ first.t()))
        return torch.tanh(x @ self.weight.t()) @ first


def test_homes_evicted_between_two_uses_make_no_second_copy(tmp_path: Path) -> None:
    model = seeded(Twice)
    expected = model(torch.ones(2, 64))
    watched = Watched(model, tmp_path, memory="200KiB")
    host = watched.runtime.parts.engine
    evicted: list[int] = []

    def evict(*_: object) -> None:
        evicted.append(len(host._resident))
        host.evict(list(host._resident))

    model.between.register_forward_hook(evict)
    for _ in range(3):
        y = model(torch.ones(2, 64))
        assert torch.equal(y, expected)
        y.sum().backward()
    assert min(evicted) > 0
    assert watched.doubles == 0
    watched.close()


class SelfClamping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.clamps = True

    def forward(self, x: Tensor) -> Tensor:
        if self.clamps:
            self.b.weight.data.clamp_(-0.1, 0.1)
        return torch.relu(self.b(self.a(x)))


def test_a_model_that_writes_to_its_weights_in_forward_is_refused(tmp_path: Path) -> None:
    model = seeded(SelfClamping)
    watched = Watched(model, tmp_path, memory="200KiB")
    with pytest.raises(offload.OffloadError, match=r"device copy of b.*was written to"):
        model(torch.ones(2, 64))
    model.clamps = False
    model(torch.ones(2, 64)).sum().backward()
    watched.close()


def test_trusting_versions_spares_uploads_and_sees_ordinary_writes(
    zoo: Any, tmp_path: Path
) -> None:
    plain = zoo.build("llama")
    reference = zoo.train("llama", plain, adamw(plain), steps=STEPS)
    uploads = []
    for trust in (False, True):
        model = zoo.build("llama")
        how = tuning(prefetch=False, trust_versions=trust)
        watched = Watched(model, tmp_path, optimizer=adamw(model), memory="1MiB", how=how)
        assert zoo.same(zoo.train("llama", model, watched.optimizer, steps=STEPS), reference)
        uploads.append(watched.device.engine.counters.demand_loads)
        ids = torch.arange(1, 9)[None]
        model.eval()
        with torch.no_grad():
            first = model(input_ids=ids).logits
            model.lm_head.weight.mul_(2)
            assert torch.equal(model(input_ids=ids).logits, first * 2)
        watched.close()
    assert uploads[1] < uploads[0] / 2


def test_replaced_data_is_used_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Watched(seeded(Keeper), tmp_path, memory="200KiB")
    model, x = watched.model, torch.ones(2, 64)
    home = model.layers[1].weight.data
    model.layers[1].weight.data = torch.full((64, 64), 0.01)
    assert torch.equal(model(x), _plainly(model, x))
    assert "layers.1.weight was given other data" in capsys.readouterr().err
    model.layers[1].weight.data = home
    assert torch.equal(model(x), _plainly(model, x))
    model.bfloat16()
    y = model(x.bfloat16())
    assert torch.equal(y, _plainly(model, x.bfloat16()))
    y.sum().backward()
    assert all(p.grad.dtype is torch.bfloat16 for p in model.parameters() if p.grad is not None)
    model.kept.clear()
    watched.close()


def _plainly(model: Keeper, x: Tensor) -> Tensor:
    for layer in model.layers:
        assert isinstance(layer, nn.Linear)
        x = torch.tanh(F.linear(x, layer.weight, layer.bias))
    return x


def test_copies_and_pickles_are_plain(tmp_path: Path) -> None:
    watched = Watched(seeded(Keeper), tmp_path, memory="200KiB")
    model, x = watched.model, torch.ones(2, 64)
    expected = model(x)
    model.kept.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(type(m._parameters) is dict for m in twin.modules())
        assert torch.equal(twin(x), expected)
        assert all(p.is_leaf for p in twin.parameters())
    watched.close()
    assert all(type(m._parameters) is dict for m in model.modules())
    assert torch.equal(model(x), expected)


def as_computed(model: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """The reference of ``compute_dtype``: each access of a parameter is a cast of its own."""

    def run(*args: Any, **kwargs: Any) -> Any:
        casts = {n: p.to(dtype) for n, p in model.named_parameters(remove_duplicate=False)}
        args = tuple(_cast(a, dtype) for a in args)
        return torch.func.functional_call(model, casts, args, kwargs, tie_weights=False)

    return run


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


class Reference(nn.Module):
    """A model that computes as ``as_computed`` does, for the same training loop."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = model
        self.run = as_computed(model, dtype)

    def forward(self, **kwargs: Any) -> Any:
        return self.run(**kwargs)


@pytest.mark.parametrize("device", ["emulated", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_compute_dtype_has_the_bits_of_explicit_casts(
    name: str, dtype: torch.dtype, device: str | None, zoo: Any, tmp_path: Path
) -> None:
    plain = Reference(zoo.build(name), dtype)
    reference = zoo.train(name, plain, adamw(plain), steps=3)
    model = zoo.build(name)
    watched = Watched(
        model, tmp_path, optimizer=adamw(model), memory="250KiB", device=device,
        host="500KiB" if device else "750KiB", compute_dtype=dtype,
    )  # fmt: skip
    run = zoo.train(name, model, watched.optimizer, steps=3)
    assert all(p.dtype is torch.float32 for p in model.parameters())
    run["weights"] = {f"inner.{n}": w for n, w in run["weights"].items()}
    assert zoo.same(run, reference)
    watched.check_tiers()
    watched.close()


def test_refusals_come_before_anything_moves(zoo: Any, tmp_path: Path) -> None:
    model = zoo.build("llama")
    before = {n: p.data_ptr() for n, p in model.named_parameters()}

    def refused(match: str, **options: Any) -> None:
        given: dict[str, Any] = {"host_memory": "1MiB", "disk": tmp_path} | options
        with pytest.raises(offload.OffloadError, match=match):
            offload.wrap(model, **given)

    refused(
        "device tier: .*embed_tokens.weight .* needs 48.1 KiB",
        device="emulated",
        device_memory="20KiB",
    )
    refused("give bfloat16", compute_dtype=torch.int8)
    refused("device=mps", device="mps")
    if not torch.cuda.is_available():
        refused("sees no CUDA device", device="cuda")
    assert before == {n: p.data_ptr() for n, p in model.named_parameters()}


@pytest.mark.parametrize("what", ["model", "part", "caller", "before"])
def test_compiled_models_are_refused(what: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    model = seeded(Keeper)
    run: Callable[..., Any] = model
    if what == "before":
        compiled: Any = torch.compile(model, backend="eager")
        with pytest.raises(offload.OffloadError, match=r"torch\.compile cannot"):
            offload.wrap(compiled, device="emulated", device_memory="1MiB")
        return
    watched = Watched(model, tmp_path, memory="200KiB")
    if what == "model":
        run = torch.compile(model, backend="eager")
    elif what == "part":
        model.layers[2].compile(backend="eager")
    else:

        def twice(x: Tensor) -> Any:
            return model(x) * 2

        run = torch.compile(twice, backend="eager")
    with pytest.raises(offload.OffloadError, match=r"torch\.compile cannot"):
        run(torch.ones(2, 64))
    watched.close()


def test_activations_that_do_not_fit_are_refused_with_the_budget_that_works(
    zoo: Any, tmp_path: Path
) -> None:
    model = zoo.build("llama")
    watched = Watched(model, tmp_path, memory="200KiB")
    ids = torch.ones(4, 32, dtype=torch.long)
    state = torch.get_rng_state()
    with pytest.raises(offload.BudgetError, match="device tier") as caught:
        model(input_ids=ids, labels=ids)
    assert caught.value.smallest_bytes > caught.value.given_bytes == 200 * 1024
    assert torch.equal(torch.get_rng_state(), state)
    watched.close()


def test_a_frame_is_free_only_when_no_tensor_refers_to_it() -> None:
    arena = DeviceArena(PageMemory(), poison=True)
    frame = arena.take(4096)
    arena.assign(frame, 7)
    tensor = arena.lend(frame)
    tensor.fill_(1)
    view, gone = tensor[8:16].view(torch.float32), weakref.ref(tensor)
    del tensor
    assert gone() is None
    arena.give(frame)
    assert (arena.idle_bytes, arena.viewed_bytes, arena.total_bytes) == (0, 4096, 4096)
    other = arena.take(4096)
    assert other.address != frame.address
    assert arena.owner_of(view) == 7
    assert view.view(torch.uint8).tolist() == [1] * 8
    del view
    assert arena.viewed_bytes == 0
    assert arena.idle_bytes == 4096
    again = arena.take(4096)
    assert again.address == frame.address
    assert set(arena.lend(again).tolist()) == {0xFF}
    arena.give(again)
    arena.give(other)
    arena.trim()
    assert arena.total_bytes == 0
