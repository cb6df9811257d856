"""What tests/test_gpu.py compares with, and its tightest budgets, tried on the emulated device.

A reference that cannot run, or a budget that its attention does not fit, would otherwise show on a
borrowed GPU only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_gpu import CHECKPOINTED, STARVED, compare, deterministic

pytestmark = pytest.mark.filterwarnings("ignore:.*determinis")
__all__ = ["deterministic"]  # a fixture that all tests here use


def test_the_starved_budget_is_one_that_the_model_fits(zoo: Any, tmp_path: Path) -> None:
    device = compare(zoo, "llama", "off", tmp_path, "emulated", device_memory=STARVED)
    assert device.engine.counters.evictions > 20


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant"])
def test_the_reference_of_checkpointed_models_runs(
    recompute: str, dtype: torch.dtype | None, zoo: Any, tmp_path: Path
) -> None:
    """In bfloat16 its weights after the forward pass are not those that it computed with either."""
    compare(
        zoo, "llama", recompute, tmp_path, "emulated", device_memory=CHECKPOINTED,
        compute_dtype=dtype,
    )  # fmt: skip
