"""The framed path on a CUDA device: the same bits as the unwrapped run there.

The unwrapped run computes on the device and updates on the CPU, as ours does, so weights agree
bit by bit and not only within a tolerance. Frames are poisoned, streams are delayed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import offload
from offload.config import Tuning
from offload.device_side import Device
from offload.steps import Kind
from offload.tiers.copy import STAGING_BUFFERS, STAGING_BYTES, CudaCopier
from offload.tiers.spec import MIB, Machine

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used

# Operations that have no deterministic form say so; what they are used for here is exact.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*determinis")]

MACHINE = Machine(2e9, 2e9, 1e9, 1e9, 8e9, 2e10)
STEPS = 4
# Found on the emulated device, with the attention of `deterministic`: tests/test_emulated_gpu.py.
STARVED = "480KiB"
CHECKPOINTED = "400KiB"


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    before = torch.are_deterministic_algorithms_enabled()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    with ExitStack() as undo:
        # The fused kernels of attention add up gradients in no fixed order.
        undo.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(before)


class OnDevice(nn.Module):
    """The unwrapped reference: CPU parameters, copied to the device at each forward pass.

    They are back on the CPU when it returns, so a model that computes again in its backward pass
    cannot be one.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, place: str) -> None:
        super().__init__()
        self.inner = model
        self._dtype = dtype
        self._place = "cpu" if place == "emulated" else place

    def forward(self, **batch: Tensor) -> Any:
        casts = {n: self._moved(p) for n, p in self.inner.named_parameters(remove_duplicate=False)}
        casts |= {n: b.to(self._place) for n, b in self.inner.named_buffers(remove_duplicate=False)}
        moved = {n: x.to(self._place) for n, x in batch.items()}
        return torch.func.functional_call(self.inner, casts, (), moved, tie_weights=False)

    def _moved(self, param: Tensor) -> Tensor:
        if self._dtype is not None and param.is_floating_point():
            return param.to(self._dtype).to(self._place)
        return param.to(self._place)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    folder: Path,
    place: str = "cuda",
    **changes: Any,
) -> Device:
    values: dict[str, Any] = {
        "chunk_bytes": 16384, "device_chunk_bytes": 24 * 1024, "machine": MACHINE, "poison": True,
        "residents": False,  # whose update is by other kernels: see test_gpu_promises.py
    }  # fmt: skip
    options: dict[str, Any] = {"device_memory": "2MiB", "host_memory": "80MiB"}  # staging is 48
    for name in ("compute_dtype", "device_memory", "host_memory"):
        if name in changes:
            options[name] = changes.pop(name)
    offload.wrap(
        model, optimizer, device=place, disk=folder, tuning=Tuning(**(values | changes)), **options
    )
    device = offload.runtime(model).parts.device
    assert device is not None
    return device


def compare(zoo: Any, name: str, recompute: str, folder: Path, place: str = "cuda",
            **changes: Any) -> Device:  # fmt: skip
    """The same losses, norms and weights. The reference computes nothing again: the same bits."""
    plain = OnDevice(zoo.build(name), changes.get("compute_dtype"), place)
    reference = zoo.train(name, plain, adamw(plain), steps=STEPS)
    model = zoo.build(name, recompute)
    optimizer = adamw(model)
    device = wrap(model, optimizer, folder, place, **changes)
    run = zoo.train(name, model, optimizer, steps=STEPS)
    run["weights"] = {f"inner.{n}": w.cpu() for n, w in run["weights"].items()}
    assert zoo.same(run, reference)
    offload.runtime(model).close()
    return device


@pytest.mark.parametrize("prefetch", [False, True], ids=["demand", "planned"])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "mixtral"])
def test_training_has_the_bits_of_the_unwrapped_run(
    name: str, prefetch: bool, zoo: Any, tmp_path: Path
) -> None:
    device = compare(zoo, name, "off", tmp_path, prefetch=prefetch)
    assert device.engine.counters.evictions > 20


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_gradient_checkpointing(recompute: str, zoo: Any, tmp_path: Path) -> None:
    compare(zoo, "llama", recompute, tmp_path, device_memory=CHECKPOINTED)


def test_compute_dtype(zoo: Any, tmp_path: Path) -> None:
    compare(zoo, "llama", "off", tmp_path, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("late", ["compute", "copies", "gradients"])
def test_delayed_streams_change_nothing(
    late: str, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing wait shows when one stream lags: the other then reads poison or overwrites."""
    if late == "copies":
        upload: Callable[..., None] = CudaCopier.upload

        def slow(self: CudaCopier, source: Tensor, target: Tensor, mark: Any) -> None:
            with torch.cuda.stream(self._up):
                torch.cuda._sleep(2_000_000)
            upload(self, source, target, mark)

        monkeypatch.setattr(CudaCopier, "upload", slow)
    elif late == "gradients":
        download: Callable[..., None] = CudaCopier.download

        def slow_down(self: CudaCopier, source: Tensor, target: Tensor, mark: Any) -> None:
            with torch.cuda.stream(self._down):
                torch.cuda._sleep(2_000_000)
            download(self, source, target, mark)

        monkeypatch.setattr(CudaCopier, "download", slow_down)
    else:
        forward = nn.Linear.forward

        def slow_forward(self: nn.Linear, x: Tensor) -> Tensor:
            torch.cuda._sleep(2_000_000)
            return forward(self, x)

        monkeypatch.setattr(nn.Linear, "forward", slow_forward)
    compare(zoo, "llama", "off", tmp_path)


def test_starved_frames_and_late_streams_together(
    zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardly more room than one layer needs: frames are reused as soon as they may be."""
    forward = nn.Linear.forward

    def slow_forward(self: nn.Linear, x: Tensor) -> Tensor:
        torch.cuda._sleep(1_000_000)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", slow_forward)
    compare(zoo, "llama", "off", tmp_path, device_memory=STARVED)


def test_a_stream_of_the_users(zoo: Any, tmp_path: Path) -> None:
    """Everything under one stream that is not the default one."""
    with torch.cuda.stream(torch.cuda.Stream()):
        compare(zoo, "llama", "off", tmp_path, device_memory=STARVED)


def test_what_is_pinned_is_what_is_debited(zoo: Any, tmp_path: Path) -> None:
    model = zoo.build("llama")
    device = wrap(model, adamw(model), tmp_path)
    copier = device.engine.frames.copier
    assert isinstance(copier, CudaCopier)
    pinned = copier.pinned_bytes
    assert pinned == copier.host_bytes == 2 * STAGING_BUFFERS * STAGING_BYTES
    assert offload.runtime(model).parts.engine.ledger.fixed_bytes >= pinned
    offload.runtime(model).close()


def test_replayed_steps_take_no_new_segments(zoo: Any, tmp_path: Path) -> None:
    model = zoo.build("llama")
    optimizer = adamw(model)
    device = wrap(model, optimizer, tmp_path)
    zoo.train("llama", model, optimizer, steps=5)
    before = torch.cuda.memory_stats()
    zoo.train("llama", model, optimizer, steps=3)
    after = torch.cuda.memory_stats()
    for key in ("segment.all.allocated", "num_alloc_retries", "num_ooms"):
        assert after[key] == before[key]
    assert device.engine.counters.planned_loads > 0
    offload.runtime(model).close()


def test_gradients_leave_beside_the_backward_pass(zoo: Any, tmp_path: Path) -> None:
    model = zoo.build("llama")
    optimizer = adamw(model)
    device = wrap(model, optimizer, tmp_path)
    zoo.train("llama", model, optimizer, steps=2)
    assert device.stats(Kind.TRAIN)["downloaded_bytes"] > 0
    assert device.engine.ledger.other_bytes == 0
    offload.runtime(model).close()


@pytest.mark.filterwarnings("ignore")  # the graph stays empty, which torch says
def test_a_cuda_graph_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    wrap(model, None, tmp_path)
    x = torch.ones(4, 64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(offload.OffloadError, match="CUDA graph cannot capture"),
        torch.cuda.graph(graph),
    ):
        model(x)
    with torch.no_grad():
        assert model(x).isfinite().all()
    offload.runtime(model).close()


def test_compile_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    wrap(model, None, tmp_path)
    with pytest.raises(offload.OffloadError, match=r"torch\.compile cannot"):
        torch.compile(model, backend="eager")(torch.ones(4, 64))
    offload.runtime(model).close()


def workspace_bytes(width: int) -> int:
    """What cuBLAS takes for products of this width beside what it is given."""
    layer, x = nn.Linear(width, width).cuda(), torch.ones(64, width, device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer.zero_grad()
        layer(x).square().mean().backward()
    taken = torch.cuda.max_memory_allocated() - before
    return max(taken - 4 * width * width, 0)  # the gradient of the weight is none of it


def test_peak_is_within_device_memory(zoo: Any, tmp_path: Path) -> None:
    """Weights of 384 MiB in 160 MiB of device memory, activations included."""
    width, budget = 2048, 160 * MIB
    beside = workspace_bytes(width)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(24)))
    optimizer = adamw(model)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    wrap(model, optimizer, tmp_path, device_memory=budget, device_chunk_bytes=16 * MIB,
         chunk_bytes=8 * MIB, host_memory="3GiB")  # fmt: skip
    for _ in range(6):
        model(torch.ones(64, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_allocated() - base <= budget + beside
    offload.runtime(model).close()


def test_inputs_outputs_and_buffers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    wrap(model, None, tmp_path)
    y = model(torch.ones(4, 64))
    assert y.device.type == "cuda"
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert all(b.device.type == "cuda" for b in model.buffers())
    y.sum().backward()
    assert all(p.grad is not None and p.grad.device.type == "cpu" for p in model.parameters())
    offload.runtime(model).close()
    assert all(b.device.type == "cpu" for b in model.buffers())
