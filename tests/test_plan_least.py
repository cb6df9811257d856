"""The least memory that a plan of rows names: a run works with it, and none with much less."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.config import Tuning
from offload.errors import BudgetError, OffloadError
from offload.groupwise import FORMATS
from offload.places import BlockPlan
from offload.plan_cli import choose
from offload.prefetch.generation import Rates, Workload
from offload.prefetch.room import floor_bytes, frames_bytes
from offload.prefetch.search import Problem
from offload.quantised import quantise
from offload.shape import model_of, read_shape, stored_as
from offload.tiers.layout import choose_chunk_bytes
from offload.tiers.spec import KIB, Budget, Compute
from tests.conftest import MACHINE

HOST = Compute(((1, 2e-10), (64, 1e-9)), 5e9)
WORK = Workload(1, 6, 4)


def config(**changes: Any) -> Any:
    """Of a Llama whose head is its largest module, and whose table is larger where it is codes."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384}
    heads = {"num_hidden_layers": 12, "num_attention_heads": 4, "eos_token_id": None}
    return LlamaConfig(**sizes | heads | changes, max_position_embeddings=64, dtype="float32")


def named(config: Any, weight_dtype: str | None) -> int:
    """The least host memory that the refusal of a plan names."""
    shape = read_shape(config, weight_dtype)
    asked = Problem(shape, Rates(MACHINE, HOST), Budget(64 * KIB), WORK)
    with pytest.raises(BudgetError) as refused:
        choose(asked)
    least_bytes = refused.value.smallest_bytes
    budget = Budget(least_bytes)
    assert choose(Problem(shape, Rates(MACHINE, HOST), budget, WORK)).rows == 1
    return least_bytes


def works(config: Any, weight_dtype: str | None, host_bytes: int, disk: Path) -> bool:
    """Whether a run generates with so much."""
    model = model_of(config, str(config.dtype).removeprefix("torch.")).eval()
    tuning = Tuning(machine=MACHINE)
    try:
        offload.wrap(
            model, None, host_memory=host_bytes, disk=disk, weight_dtype=weight_dtype,
            tuning=tuning,
        )  # fmt: skip
        with offload.runtime(model) as run:
            rows = run.generate([[1] * WORK.prompt_tokens], WORK.new_tokens, plan=BlockPlan(1))
            return len(rows) == 1 and run.parts.engine.ledger.peak_bytes <= host_bytes
    except BudgetError:
        return False


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weight_dtype", [None, "int4", "int8"])
def test_the_least_that_is_named_works_and_little_less_does_not(
    weight_dtype: str | None, dtype: str, tmp_path: Path
) -> None:
    asked = stored_as(config(), dtype)
    least_bytes = named(asked, weight_dtype)
    assert works(asked, weight_dtype, least_bytes, tmp_path)
    chunk_bytes = choose_chunk_bytes(least_bytes // 2, 2)
    assert not works(asked, weight_dtype, least_bytes - chunk_bytes - 2 * KIB, tmp_path)


def test_a_table_of_which_a_few_rows_are_read_has_to_fit_beside_a_chunk(tmp_path: Path) -> None:
    """What int4 leaves wide: 125 MiB were said to do for one of 125 MiB, and were refused."""
    asked = config(vocab_size=24576, num_hidden_layers=2)
    table_bytes = 4 * 24576 * 128
    least_bytes = named(asked, "int4")
    chunk_bytes = choose_chunk_bytes(least_bytes // 2, 2)
    assert least_bytes == floor_bytes(table_bytes, chunk_bytes, 2)
    assert works(asked, "int4", least_bytes, tmp_path)
    assert not works(asked, "int4", least_bytes - KIB, tmp_path)


def test_whole_chunks_hold_a_module_wherever_it_begins() -> None:
    for unit in (0, 1, 63, 64, 65, 640):
        for chunk in (1, 16, 64):
            most = max((b + unit - 1) // chunk - b // chunk + 1 for b in range(chunk))
            assert frames_bytes(unit, chunk) == (most * chunk if unit else 0)


@pytest.mark.parametrize("weight_dtype", ["int4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_of_codes_are_those_of_the_quantised_model(weight_dtype: str, tied: bool) -> None:
    asked = config(tie_word_embeddings=tied, num_hidden_layers=2)
    model = model_of(asked, "float32")
    count = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    form = FORMATS[weight_dtype]
    quantise(model, form, None, lambda s: torch.empty(s, dtype=torch.uint8), lambda _: None)
    weights = read_shape(asked, weight_dtype).weights
    stored_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights.total_bytes == stored_bytes
    assert weights.layers * weights.layer_elements + weights.head_elements == count
    assert weights.largest_bytes == 4 * 4096 * 128


def test_codes_are_widened_to_the_type_that_is_asked_for() -> None:
    """Beside int4, --dtype was passed over: the table was counted, and layers timed, in float32."""
    wide, narrow = (
        read_shape(stored_as(config(), dtype), "int4").weights for dtype in (None, "bfloat16")
    )
    assert wide.lookup_bytes == 2 * narrow.lookup_bytes
    assert str(stored_as(config(), None).dtype).endswith("float32")
    with pytest.raises(OffloadError, match="give one of"):
        stored_as(config(), "int4")
