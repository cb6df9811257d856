"""P1 where weights live on the device: on a GPU, and the same test on the emulated device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload.config import Tuning
from tests.test_gpu_promises import MACHINE, Run, mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*determinis")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where weights are computed with; no room for temporaries of large updates comes first."""
    monkeypatch.setattr("offload.residents.UPDATE_BYTES", 0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("memory", ["1200KiB", "64MiB"], ids=["some", "all"])
@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_weights_that_live_there_have_the_bits_of_the_unwrapped_run(
    place: str, memory: str, fused: bool, tmp_path: Path
) -> None:
    """From where they came to live there; steps before were updated by the CPU's kernels."""
    tuning = Tuning(device_chunk_bytes=80 * 1024, machine=MACHINE, poison=True)
    ours = Run(place, tmp_path, device_memory=memory, tuning=tuning, host_memory="80MiB")
    for group in ours.optimizer.param_groups:
        group["fused"] = fused
    ours.steps(3)
    residents = ours.run.parts.binding.residents
    assert residents
    where = ours.device.place
    plain = mlp().to(where)
    for a, b in zip(plain.parameters(), ours.model.parameters(), strict=True):
        a.data.copy_(b)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=fused)
    reference.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    ours.steps(3, first=3)
    for seed in range(3, 6):
        generator = torch.Generator().manual_seed(seed)
        plain(torch.randn(8, 128, generator=generator).to(where)).square().mean().backward()
        reference.step()
        reference.zero_grad()
    for a, b in zip(plain.parameters(), ours.model.parameters(), strict=True):
        if b in residents:
            assert b.device == a.device
            if len(residents) == len(list(plain.parameters())):
                assert torch.equal(a, b)
            else:  # what is updated on the CPU takes its bits to all
                torch.testing.assert_close(a, b)
    ours.run.close()
    assert all(p.device.type == "cpu" for p in ours.model.parameters())
