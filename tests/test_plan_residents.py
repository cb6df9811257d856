"""What `offload plan` says of weights that live on a device, against runs on the emulated one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import offload
from offload.advise import advise
from offload.blueprint import FineTune, build, draft, optimizer_of, outline_of
from offload.device_level import Frames, Rules, level_of
from offload.dryrun import dry_run
from offload.forecast import Answer, Forecaster
from offload.machines import Processor, Site
from offload.report import report_data
from offload.run import Runtime
from offload.steps import Kind
from offload.tiers.spec import GIB, KIB, MIB, Budget, Machine, format_size
from tests.framed import MACHINE, tuning
from tests.test_synthesis import CHUNK_BYTES, Unhurried, gpt2, llama, mixtral, t5

EMULATED = Rules(lambda size_bytes: size_bytes, 0)
LINK = replace(MACHINE, d2h_bytes_per_s=8e9)
SLOW_DISK = Machine(1e7, 1e7, 5e6, 5e6, 8e9, 8e9)  # so that whatever spares it is advised
HOST_BYTES = 1536 * KIB  # not enough for all of full fine-tuning
STEPS = 6
FULL = FineTune(batch=2, sequence=16)


class Real:
    """A run on the emulated device, and what one more step of it moves."""

    def __init__(
        self, config: Any, job: FineTune, device_bytes: int, folder: Path | None,
        machine: Machine = MACHINE,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.model = build(config, job)
        self.optimizer = optimizer_of(self.model)
        self.job = job
        compute = getattr(torch, job.compute_dtype) if job.compute_dtype else None
        offload.wrap(
            self.model, self.optimizer, device="emulated", device_memory=device_bytes,
            host_memory=HOST_BYTES if folder else 8 * MIB, disk=folder, compute_dtype=compute,
            step_in_backward=job.in_backward, state_dtype=job.state_dtype,
            tuning=tuning(seed=None, residents=True, device_chunk_bytes=None, machine=machine),
        )  # fmt: skip
        self.run: Runtime = offload.runtime(self.model)
        self.step()
        assert self.run.parts.device is not None
        self.recorded = self.run.parts.device.steps.tracks[Kind.TRAIN].trace
        for _ in range(STEPS):
            self.step()

    @property
    def complete(self) -> bool:
        """Whether every weight lives there."""
        device = self.run.parts.device
        return device is not None and device.residents is not None and device.residents.complete

    def step(self) -> None:
        ids = torch.randint(0, 128, (self.job.batch, self.job.sequence))
        self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def crossing(self) -> tuple[int, int]:
        """Bytes up and down in one more step."""
        then = self.run.stats()["device"]
        self.step()
        now = self.run.stats()["device"]
        up, down = (int(now[k] - then[k]) for k in ("uploaded_bytes", "downloaded_bytes"))
        return up, down

    def held(self) -> dict[str, int]:
        """Of what lives there, by kind."""
        residents = self.run.parts.binding.residents
        trained = [p for p in residents if p.requires_grad]
        state = [v for p in trained for v in self.optimizer.state[p].values() if v.dim()]
        return {
            "weights": sum(p.nbytes for p in residents),
            "gradients": sum(p.nbytes for p in trained),
            "optimizer": sum(v.nbytes for v in state),
        }

    def tier(self, name: str) -> dict[str, int]:
        found: dict[str, int] = self.run.stats()["tiers"][name]
        return found


def site_of(device_bytes: int, flops_per_s: float = 1e12) -> Site:
    processor = Processor(flops_per_s, 1e12, 1e10)
    return Site("x", LINK, processor, HOST_BYTES, device_bytes, GIB)


def foretold(config: Any, job: FineTune, device_bytes: int) -> Answer:
    budget = Budget(HOST_BYTES, device_bytes, GIB)
    return Forecaster(config, EMULATED).answer(job, site_of(device_bytes), budget, CHUNK_BYTES)


def named(
    device_bytes: int, flops_per_s: float = 1e12, host_bytes: int = HOST_BYTES
) -> list[str]:  # fmt: skip
    """What is said to help."""
    forecaster, site = Forecaster(llama(), EMULATED), site_of(device_bytes, flops_per_s)
    budget = Budget(host_bytes, device_bytes, GIB)
    answer = forecaster.answer(FULL, site, budget)
    return [change.what for change in advise(forecaster, FULL, site, budget, answer)]


JOBS: dict[str, tuple[Callable[[], Any], FineTune]] = {
    "llama": (llama, FULL),
    "tied": (gpt2, FULL),
    "encoder and decoder": (t5, FULL),
    "experts": (mixtral, FULL),
    "recompute": (llama, replace(FULL, recompute=True)),
    "in backward": (llama, replace(FULL, in_backward=True)),
    "lora": (llama, replace(FULL, method="lora", rank=4)),
    "int4": (llama, replace(FULL, method="lora", rank=4, weight_dtype="int4")),
    "bf16 computed": (llama, replace(FULL, compute_dtype="bfloat16")),
    "narrow state": (llama, replace(FULL, state_dtype="bf16")),
}


@pytest.mark.parametrize("device_bytes", [MIB, 2 * MIB, 8 * MIB], ids=["few", "some", "all"])
@pytest.mark.parametrize("name", JOBS)
def test_what_lives_there_and_what_crosses_is_that_of_a_run(
    name: str, device_bytes: int, tmp_path: Path
) -> None:
    make, job = JOBS[name]
    real, answer = Real(make(), job, device_bytes, tmp_path), foretold(make(), job, device_bytes)
    device = real.tier("device")
    assert answer.resident_bytes == device["resident_bytes"]
    for kind, held_bytes in real.held().items():
        assert answer.kinds[kind].device == held_bytes
    assert answer.pace is not None
    up, down = real.crossing()
    assert answer.pace.down_bytes == down
    assert answer.pace.up_bytes == up
    assert (up == 0) is (answer.pace.up_bytes == 0) is real.complete
    assert real.complete or device_bytes < 8 * MIB or job.state_dtype is not None
    assert device["peak_bytes"] <= answer.tiers["device"].peak_bytes
    moved = real.run.stats()["step_bytes"]
    for way, said in (("read", answer.pace.read_bytes), ("write", answer.pace.write_bytes)):
        assert said == pytest.approx(moved[way] or 0, rel=0.1, abs=64)
    peak_bytes = real.tier("host")["peak_bytes"]
    assert answer.tiers["host"].peak_bytes == pytest.approx(peak_bytes, rel=0.05)
    real.run.close()


@pytest.mark.parametrize("name", ["llama", "lora", "bf16 computed"])
def test_the_least_works_and_nothing_lives_there(name: str, tmp_path: Path) -> None:
    make, job = JOBS[name]
    least_bytes = foretold(make(), job, 8 * MIB).tiers["device"].needed_bytes
    answer = foretold(make(), job, least_bytes)
    needed_bytes = answer.tiers["device"].needed_bytes
    assert needed_bytes <= least_bytes  # smaller frames
    answer = foretold(make(), job, needed_bytes)
    assert answer.fits
    real = Real(make(), job, needed_bytes, tmp_path)
    assert answer.resident_bytes == real.tier("device")["resident_bytes"] == 0
    assert answer.pace is not None
    up, down = real.crossing()
    assert answer.pace.down_bytes == down
    assert answer.pace.up_bytes == up
    real.run.close()
    short = foretold(make(), job, needed_bytes - 64)
    assert not short.fits
    assert short.tiers["device"].spare_bytes < 0


@pytest.mark.parametrize("name", JOBS)
def test_the_level_is_that_of_a_recorded_step(name: str, tmp_path: Path) -> None:
    make, job = JOBS[name]
    real = Real(make(), job, 8 * MIB, tmp_path)
    frames_dtype = job.compute_dtype or job.dtype
    plain = replace(job, dtype=frames_dtype, compute_dtype=None)
    made = draft(make(), plain)
    where = outline_of(made.model, plain, HOST_BYTES, CHUNK_BYTES)
    itemsizes = [2 if job.compute_dtype else f.weights.itemsize for f in where.families]
    buffers = sum(b.numel() * b.element_size() for b in made.model.buffers())
    cut = Frames(itemsizes, 8 * MIB, buffers, EMULATED)
    level = level_of(dry_run(made), where, cut, Unhurried())
    assert real.recorded is not None
    assert level.trace.chunk_bytes == real.recorded.chunk_bytes
    keys = [[m.key for m in t.moments] for t in (level.trace, real.recorded)]
    assert keys[0] == keys[1]
    most = [max(m.other_bytes for m in t.moments) for t in (level.trace, real.recorded)]
    assert most[0] == pytest.approx(most[1], abs=64)
    real.run.close()


def test_more_device_memory_is_advised_where_it_helps() -> None:
    assert any("device memory" in what for what in named(MIB))
    assert not any("device memory" in what for what in named(MIB, 1e7, 16 * MIB))
    too_little = named(256 * KIB)
    assert any("MiB of device memory" in what for what in too_little)
    assert not any("host memory" in what for what in too_little)


def test_where_all_lives_there_nothing_is_advised_for_what_no_longer_moves() -> None:
    pointless = ("memory", "optimizer state", "step-in-backward")
    assert not [what for what in named(8 * MIB) if any(word in what for word in pointless)]
    assert any("step-in-backward" in what for what in named(MIB))


def test_what_lives_there_is_updated_there() -> None:
    answers = [foretold(llama(), FULL, b) for b in (MIB, 2 * MIB, 8 * MIB)]
    few, some, every = (answer.pace for answer in answers)
    assert few is not None
    assert some is not None
    assert every is not None
    lanes = [pace.lanes for pace in (few, some, every)]
    assert lanes[0]["update"] > lanes[1]["update"] > lanes[2]["update"] == 0
    there = [lane["update on the device"] for lane in lanes]
    assert 0 < there[0] < there[1] < there[2]
    # AdamW: weights and two states read and written, gradients read; 4 bytes each.
    elements = sum(p.numel() for p in build(llama(), FULL).parameters())
    assert there[2] == pytest.approx(7 * 4 * elements / 1e12)
    for answer, lane in zip(answers[:2], lanes, strict=False):
        at_home = elements - answer.kinds["weights"].device // 4
        assert lane["update"] == pytest.approx(7 * 4 * at_home / 1e10, rel=0.05)
    assert few.step_s > some.step_s > every.step_s
    for pace in (few, some, every):
        assert pace.bound_s <= pace.step_s * (1 + 1e-9)
    assert every.bound_s == pytest.approx(every.lanes["compute"] + there[2])


def test_a_gpu_is_counted_as_its_allocator_counts() -> None:
    budget = Budget(HOST_BYTES, 8 * MIB, GIB)
    site = site_of(8 * MIB)
    there = Forecaster(llama()).answer(FULL, site, budget, CHUNK_BYTES)
    assert there.resident_bytes == 0  # room for an update's temporaries comes first
    large = replace(budget, device_bytes=GIB)
    there = Forecaster(llama()).answer(FULL, site, large, CHUNK_BYTES)
    plain = foretold(llama(), FULL, 8 * MIB)
    assert there.resident_bytes > plain.resident_bytes
    assert there.kinds["weights"].device % 512 == 0


@pytest.mark.parametrize("disk", [True, False], ids=["disk", "no disk"])
@pytest.mark.parametrize("device_bytes", [MIB, 8 * MIB], ids=["few", "all"])
def test_the_report_says_what_would_let_all_live_there(
    device_bytes: int, disk: bool, tmp_path: Path
) -> None:
    real = Real(llama(), FULL, device_bytes, tmp_path if disk else None, SLOW_DISK)
    device = real.run.parts.device
    assert device is not None
    assert device.residents is not None
    trace = device.steps.tracks[Kind.TRAIN].trace
    lacking_bytes = device.residents.lacking_bytes(trace) if trace is not None else 0
    advice = report_data(real.run)["verdict"]["advice"]
    real.run.close()
    assert not any("state_dtype" in line for line in advice)
    said = [line for line in advice if "more device memory" in line]
    assert bool(said) is (device_bytes == MIB)
    if said:
        assert lacking_bytes is not None
        assert format_size(lacking_bytes) in said[0]
        enough = Real(llama(), FULL, device_bytes + lacking_bytes + 64 * KIB, tmp_path)
        assert enough.complete
        enough.run.close()
