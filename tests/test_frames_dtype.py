"""Weights in frames: computing in another dtype, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import offload
from tests.framed import Keeper, Watched, adamw, seeded, tuning


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


def test_from_pretrained_computes_in_another_dtype(zoo: Any, tmp_path: Path) -> None:
    zoo.build("llama").save_pretrained(tmp_path / "saved")
    ids = torch.arange(1, 13)[None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = as_computed(plain, torch.bfloat16)(input_ids=ids).logits
    model = offload.from_pretrained(
        tmp_path / "saved", compute_dtype=torch.bfloat16, host_memory="750KiB",
        disk=tmp_path / "spill", tuning=tuning(),
    )  # fmt: skip
    with offload.runtime(model), torch.no_grad():
        found = model(input_ids=ids).logits
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)
    assert all(p.dtype is torch.float32 for p in model.parameters())


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


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_a_weight_is_aligned_alike_whatever_frame_it_is_in(own: torch.dtype) -> None:
    """Kernels are chosen by an alignment of up to 256 bytes."""
    model = nn.Sequential(*(nn.Linear(65, 65) for _ in range(6))).to(own)
    watched = Watched(model, None, host="64MiB", how=tuning(None), compute_dtype=torch.bfloat16)
    slots = watched.device.engine.frames.slots.values()
    assert all(slot.offset * slot.dtype.itemsize % 256 == 0 for slot in slots)
    assert any(slot.offset for slot in slots)
    watched.close()
