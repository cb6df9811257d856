"""The framed path on a CUDA device: the same bits as the unwrapped run there.

The unwrapped run computes on the device and updates on the CPU, as ours does, so weights agree
bit by bit and not only within a tolerance. Frames are poisoned, streams are delayed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.config import Tuning
from offload.device_engine import Device
from offload.tiers.spec import MIB, Machine

pytestmark = pytest.mark.gpu

MACHINE = Machine(2e9, 2e9, 1e9, 1e9, 8e9, 2e10)
STEPS = 4


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(before)


class OnDevice(nn.Module):
    """The unwrapped reference: CPU parameters, copied to the device at each forward pass."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.inner = model
        self._dtype = dtype

    def forward(self, **batch: Tensor) -> Any:
        casts = {n: self._moved(p) for n, p in self.inner.named_parameters(remove_duplicate=False)}
        casts |= {n: b.to("cuda") for n, b in self.inner.named_buffers(remove_duplicate=False)}
        moved = {n: x.to("cuda") for n, x in batch.items()}
        return torch.func.functional_call(self.inner, casts, (), moved, tie_weights=False)

    def _moved(self, param: Tensor) -> Tensor:
        if self._dtype is not None and param.is_floating_point():
            return param.to(self._dtype).to("cuda")
        return param.to("cuda")


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def wrap(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: Path, **changes: Any
) -> Device:
    values: dict[str, Any] = {
        "chunk_bytes": 16384, "device_chunk_bytes": 24 * 1024, "machine": MACHINE, "poison": True,
    }  # fmt: skip
    options: dict[str, Any] = {"device_memory": "2MiB", "host_memory": "32MiB"}
    for name in ("compute_dtype", "device_memory"):
        if name in changes:
            options[name] = changes.pop(name)
    offload.wrap(
        model, optimizer, device="cuda", disk=folder, tuning=Tuning(**(values | changes)), **options
    )
    device = offload.runtime(model).parts.device
    assert device is not None
    return device


def compare(zoo: Any, name: str, recompute: str, folder: Path, **changes: Any) -> Device:
    plain = OnDevice(zoo.build(name, recompute), changes.get("compute_dtype"))
    reference = zoo.train(name, plain, adamw(plain), steps=STEPS)
    model = zoo.build(name, recompute)
    optimizer = adamw(model)
    device = wrap(model, optimizer, folder, **changes)
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
    compare(zoo, "llama", recompute, tmp_path, device_memory="400KiB")


def test_compute_dtype(zoo: Any, tmp_path: Path) -> None:
    compare(zoo, "llama", "off", tmp_path, compute_dtype=torch.bfloat16)


@pytest.mark.parametrize("late", ["compute", "copies"])
def test_delayed_streams_change_nothing(
    late: str, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing wait shows when one stream lags: the other then reads poison or overwrites."""
    from offload.tiers.copy import CudaCopier

    if late == "copies":
        upload: Callable[..., None] = CudaCopier.upload

        def slow(self: CudaCopier, source: Tensor, target: Tensor, mark: Any) -> None:
            with torch.cuda.stream(self._stream):
                torch.cuda._sleep(2_000_000)
            upload(self, source, target, mark)

        monkeypatch.setattr(CudaCopier, "upload", slow)
    else:
        forward = nn.Linear.forward

        def slow_forward(self: nn.Linear, x: Tensor) -> Tensor:
            torch.cuda._sleep(2_000_000)
            return forward(self, x)

        monkeypatch.setattr(nn.Linear, "forward", slow_forward)
    compare(zoo, "llama", "off", tmp_path)


def test_peak_is_within_device_memory(zoo: Any, tmp_path: Path) -> None:
    """Weights of 24 MiB in 16 MiB of device memory, activations included."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(24)))
    optimizer = adamw(model)
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")  # cuBLAS takes its workspace
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    wrap(model, optimizer, tmp_path, device_memory="16MiB", device_chunk_bytes=MIB)
    for _ in range(4):
        model(torch.ones(64, 512)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.cuda.max_memory_allocated() - base <= 16 * MIB
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
