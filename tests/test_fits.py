"""The arithmetic of scripts/gpu_check: what cannot fit is seen before a model is built."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import OPTForCausalLM

from offload.blockroom import block_cost, largest_unit_bytes
from offload.places import KVCost


@pytest.fixture(scope="module", autouse=True)
def bench_can_be_imported() -> Iterator[None]:
    folder = str(Path(__file__).parent.parent / "bench")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


def test_what_cannot_fit_by_arithmetic_is_not_run(tmp_path: Path) -> None:
    runner: Any = importlib.import_module("gpu.runner")
    parts: Any = importlib.import_module("gpu.parts")
    catalogue = parts.Catalogue(tmp_path, emulated=False, host_gb=137)
    every = [t for part in [*catalogue.parts(), catalogue.quick()] for t in part.tasks]
    assert [task.name for task in every if task.not_run] == []
    refused = [
        *catalogue.trained("1.3b", "quarter", "4096", "ours", "fsdp2"),  # activations kept
        *catalogue.trained("1.3b", "16", "2048", "ours", batch="4"),
        *catalogue.trained("largest", "24", "4096", "ours"),
        *catalogue.trained("1.3b", "8", "2048", "torchao"),
        *catalogue.long("65536", "24", "ours-checkpointing", "ours-swap"),
        *catalogue.long("65536", "none", "save_on_cpu"),
    ]
    assert all(task.not_run.startswith("cannot fit: at least ") for task in refused)
    assert "28.3 GB of device memory" in catalogue.long("16384", "24", "checkpointing")[0].not_run
    assert "of host memory" in refused[-1].not_run
    small = parts.Catalogue(tmp_path, emulated=False, host_gb=32)
    assert "of host memory" in small.rerun("3b", "24", "4096", "ours")[0].not_run
    assert not parts.Catalogue(tmp_path, emulated=True).rerun("3b", "8", "9", "ours")[0].not_run
    state = runner.State.of(tmp_path)
    assert runner.run_part(runner.Part(1, "p", "", tuple(refused)), state, {}, print)
    assert {found["status"] for found in state.tasks.values()} == {"not run"}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft asks for it
@pytest.mark.parametrize(
    ("way", "unit", "dtype"),
    [("ours", "SAVED_BF16", torch.bfloat16), ("plain", "SAVED_AUTOCAST", torch.float32),
     ("lora", "SAVED_LORA", torch.bfloat16)],
)  # fmt: skip
def test_what_a_layer_saves_is_what_the_arithmetic_says(
    way: str, unit: str, dtype: torch.dtype
) -> None:
    """Of two layers more, without weights and autocast's copies of them."""
    common, fits = (importlib.import_module(f"gpu.{n}") for n in ("common", "fits"))
    shapes: Any = importlib.import_module("gpu.shapes")
    ids = torch.randint(0, 64, (1, 192))

    def saved_bytes(layers: int) -> int:
        model = common.llama(shapes.Shape(256, layers, 688, 64), dtype)
        if way == "lora":
            peft = pytest.importorskip("peft")
            told = peft.LoraConfig(r=1, target_modules=["q_proj", "v_proj"])
            # Ours computes with adapters in bf16 too.
            model = peft.get_peft_model(model, told, autocast_adapter_dtype=False)
        seen = {p.untyped_storage().data_ptr(): (0, p) for p in model.parameters()}
        weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
        weights |= {shape[::-1] for shape in weights}

        def pack(saved: torch.Tensor) -> torch.Tensor:
            storage = saved.untyped_storage()
            copied = way == "plain" and saved.shape in weights
            seen.setdefault(storage.data_ptr(), (0 if copied else storage.nbytes(), saved))
            return saved

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
            torch.autocast("cpu", torch.bfloat16, enabled=way == "plain"),
        ):
            model(input_ids=ids, labels=ids)
        return sum(n for n, _ in seen.values())

    unit_bytes = 2 * 256 * ids.numel()
    each_bytes = (saved_bytes(3) - saved_bytes(1)) / 2
    assert each_bytes / unit_bytes == pytest.approx(getattr(fits, unit), rel=0.05)


def test_keys_and_values_beyond_the_cap_leave_room_for_their_prompts() -> None:
    """On the device: activations of the rows that have their turn, and of those that wait."""
    generate: Any = importlib.import_module("gpu.generate")
    shapes: Any = importlib.import_module("gpu.shapes")
    args = argparse.Namespace(emulated=False, short=False, host_gb=137.0)
    with torch.device("meta"):
        model = OPTForCausalLM(generate.opt_config(args, generate.KV_LAYERS)).bfloat16()
    cost, plan = block_cost(model), generate.KV_PLAN
    lengths = [generate.KV_PROMPT] * plan.rows
    each = cost.position_bytes // cost.layers
    kv = KVCost(8 << 30, each, cost.layers, crossing_bytes=each)
    cost = dataclasses.replace(cost, position_bytes=0, kv=kv)
    needed_bytes = cost.of(plan, lengths, generate.NEW) + largest_unit_bytes(model)
    cap_bytes = 8 * shapes.GB
    assert needed_bytes + cost.largest_result_bytes(plan, lengths) < 0.8 * cap_bytes
    kv_bytes = each * cost.layers * sum(lengths)
    assert kv_bytes > cap_bytes
    assert kv_bytes > kv.memory_bytes, "some are on disk"


def test_the_host_is_what_it_is_told_to_be(tmp_path: Path) -> None:
    parts, shapes = (importlib.import_module(f"gpu.{n}") for n in ("parts", "shapes"))
    told = parts.Catalogue(tmp_path, emulated=False, host_gb=137).parts()
    assert all(t.command[-2:] == ("--host-gb", "137") for part in told for t in part.tasks)
    measured = parts.Catalogue(tmp_path, emulated=False).parts()
    assert "--host-gb" not in measured[0].tasks[0].command
    assert shapes.named("largest", 137 * shapes.GB).layers == 30
    assert shapes.memory_bytes(2.5) == 2_500_000_000
    assert shapes.memory_bytes(None) == psutil.virtual_memory().total
