"""Autocast around weights in frames: it keeps no copies of what is in no account."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.internals import TorchDispatchMode, storage_lives
from tests.framed import Watched, adamw, tuning
from tests.resident import loss_of, mlp, same, weights


class Casts(TorchDispatchMode):
    """Notes what is converted to bfloat16, and whether it is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Callable[[], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.shape == (128, 128):
            self.made.append(storage_lives(result))
        return result


@pytest.mark.parametrize("residents", [False, True])
def test_inference_keeps_no_converted_weights(residents: bool, tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    watched = Watched(model, tmp_path, memory="2MiB", host="1MiB",
                      how=tuning(residents=residents))  # fmt: skip
    x = torch.randn(4, 128)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        held = watched.runtime.stats()["tiers"]["device"]["resident_bytes"]
        assert (held > 0) is residents
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = plain(x)
        with torch.autocast("cpu", dtype=torch.bfloat16), Casts() as casts:
            assert torch.equal(model(x), expected)
            assert len(casts.made) == 8
            assert not any(lives() for lives in casts.made)
    watched.close()


def test_training_has_the_same_bits(tmp_path: Path) -> None:
    plain, model = mlp(), mlp()
    reference, optimizer = adamw(plain), adamw(model)
    watched = Watched(model, tmp_path, optimizer, host="1MiB")
    losses: list[list[float]] = [[], []]
    for each, opt, seen in zip((plain, model), (reference, optimizer), losses, strict=True):
        for seed in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    seen.append(loss_of(each, seed + 9).item())
                loss = loss_of(each, seed)
            loss.backward()
            opt.step()
            opt.zero_grad()
            seen.append(loss.item())
    assert losses[0] == losses[1]
    assert same(weights(model), weights(plain))
    watched.close()
