"""Optimizers and models whose state cannot be narrowed are refused before anything is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import offload
from offload.errors import OffloadError

O = torch.optim  # noqa: E741
Make = Callable[[Any], Optimizer]


def _conv() -> nn.Module:
    conv: nn.Module = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return conv


REFUSED: dict[str, tuple[Callable[[], nn.Module], Make | None, str, str]] = {
    "factored": (lambda: nn.Linear(64, 32), lambda p: O.Adafactor(p), "bf16", "has shape"),
    "matrices": (
        lambda: nn.Linear(64, 32, bias=False), lambda p: O.Muon(p), "int8", "one by one",
    ),
    "stateless": (lambda: nn.Linear(8, 8), lambda p: O.SGD(p), "bf16", "keeps no state"),
    "small": (
        lambda: nn.Linear(8, 8).bfloat16(), lambda p: O.AdamW(p), "bf16", "keeps no state",
    ),
    "layout": (_conv, lambda p: O.AdamW(p), "bf16", "not contiguous"),
    "unknown": (lambda: nn.Linear(8, 8), lambda p: O.AdamW(p), "fp8", "must be"),
    "nothing": (lambda: nn.Linear(8, 8), None, "bf16", "give an optimizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_touched(case: str, tmp_path: Path) -> None:
    build, make, state_dtype, words = REFUSED[case]
    model = build()
    optimizer = None if make is None else make(list(model.parameters()))
    where = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(OffloadError, match=words):
        offload.wrap(model, optimizer, host_memory="1GiB", disk=tmp_path, state_dtype=state_dtype)
    assert [p.data_ptr() for p in model.parameters()] == where
    assert "_offload" not in model.__dict__
    assert not list(tmp_path.iterdir())
    assert optimizer is None or not optimizer.state
