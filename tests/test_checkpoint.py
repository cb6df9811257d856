"""A checkpoint is whole or not there, and a run goes on from it with the same bits."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

import offload
from offload import publish
from offload.codec import decode, encode
from offload.config import Tuning
from offload.errors import CheckpointError
from offload.run import Runtime
from offload.stsafe import FileRecord, HashingReader, Spec, shard
from offload.tiers.spec import Machine

MACHINE = Machine(1.8e9, 5.5e9, 1.4e9, 1.4e9, 1e10)
BUDGET = "768KiB"
WIDTH, DEPTH, VOCABULARY = 96, 4, 200

MakeOptimizer = Callable[[nn.Module], Optimizer]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True, amsgrad=True),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
}


class Net(nn.Module):
    """Embedding, blocks with dropout, buffers, a channels-last convolution: 2 MiB trained."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 3 * width), nn.Dropout(0.1), nn.Linear(3 * width, width))
            for _ in range(DEPTH)
        )
        self.conv = nn.Conv2d(3, 64, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, VOCABULARY)
        self.frozen = nn.Parameter(torch.randn(width, width), requires_grad=False)
        self.register_buffer("fleeting", torch.ones(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:  # [batch] -> [batch, vocabulary]
        x = self.embed(ids) @ self.frozen * 0.1
        for block in self.blocks:
            x = x + block(x)
        picture = x[:, :75].reshape(-1, 3, 5, 5)
        x = x + self.conv(picture).mean((1, 2, 3))[:, None]
        logits: Tensor = self.head(self.norm(x))
        return logits


def fresh(
    make: MakeOptimizer, folder: Path, *, seed: int = 0, budget: str = BUDGET, width: int = WIDTH
) -> tuple[Runtime, Any]:
    torch.manual_seed(seed)
    model = Net(width)
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    offload.wrap(
        model, optimizer, host_memory=budget, disk=folder,
        tuning=Tuning(chunk_bytes=65536, machine=MACHINE, poison=True),
    )  # fmt: skip
    return offload.runtime(model), scheduler


def train(run: Runtime, scheduler: Any, steps: int = 3) -> list[float]:
    losses = []
    assert run.optimizer is not None
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (16,))
        loss = nn.functional.cross_entropy(run.model(ids), ids.roll(1))
        torch.autograd.backward(loss)
        run.optimizer.step()
        scheduler.step()
        run.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def snapshot(run: Runtime) -> dict[str, Tensor]:
    """Copies of all weights, buffers and state."""
    found = {k: v.detach().clone() for k, v in run.model.state_dict().items()}
    names: dict[Tensor, str] = {p: k for k, p in run.model.named_parameters()}
    for p, entries in (run.optimizer.state if run.optimizer else {}).items():
        found |= {f"{names[p]}::{k}": v.clone() for k, v in entries.items() if hasattr(v, "clone")}
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.fixture
def spill(tmp_path: Path) -> Path:
    return tmp_path / "spill"


@pytest.fixture
def trained(tmp_path: Path, spill: Path) -> Iterator[tuple[Runtime, Any, Path]]:
    """A run after three steps, and its checkpoint."""
    run, scheduler = fresh(OPTIMIZERS["adamw"], spill)
    train(run, scheduler)
    run.save(tmp_path / "point", scheduler)
    yield run, scheduler, tmp_path / "point"
    run.close()


# -- going on -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resume_is_bit_exact(kind: str, tmp_path: Path, spill: Path) -> None:
    run, scheduler = fresh(OPTIMIZERS[kind], spill)
    train(run, scheduler)
    before = run.parts.engine.counters.evictions
    run.save(tmp_path / "point", scheduler, {"step": 3})
    assert run.parts.engine.counters.evictions > before  # it did not fit, and was streamed
    losses = train(run, scheduler)
    rates = [g["lr"] for g in run.optimizer.param_groups] if run.optimizer else []
    expected = snapshot(run)
    draws = torch.rand(3), random.random(), np.random.rand()
    run.close()

    again, scheduler = fresh(OPTIMIZERS[kind], spill, seed=1)
    assert again.load(tmp_path / "point", scheduler) == {"step": 3}
    assert train(again, scheduler) == losses
    assert again.optimizer is not None
    assert [g["lr"] for g in again.optimizer.param_groups] == rates
    assert same(snapshot(again), expected)
    torch.testing.assert_close(
        (torch.rand(3), random.random(), np.random.rand()), draws, rtol=0, atol=0
    )
    host = again.stats()["tiers"]["host"]
    assert host["peak_bytes"] <= host["budget_bytes"]
    again.close()


def test_state_lives_in_its_homes_after_load(
    trained: tuple[Runtime, Any, Path], spill: Path
) -> None:
    _, _, point = trained
    again, scheduler = fresh(OPTIMIZERS["adamw"], spill, seed=1)
    again.load(point, scheduler)
    space = again.parts.engine.space
    assert again.optimizer is not None
    for entries in again.optimizer.state.values():
        assert entries["step"].shape == ()
        for name in ("exp_avg", "exp_avg_sq"):
            assert space.chunks_at(entries[name].data_ptr(), 4)
    again.close()


def test_going_back_in_the_same_run(trained: tuple[Runtime, Any, Path]) -> None:
    run, scheduler, point = trained
    losses = train(run, scheduler)
    run.load(point, scheduler)
    assert train(run, scheduler) == losses


def test_another_budget_and_no_disk(trained: tuple[Runtime, Any, Path], spill: Path) -> None:
    run, scheduler, point = trained
    losses = train(run, scheduler)
    torch.manual_seed(5)
    model = Net()
    optimizer = OPTIMIZERS["adamw"](model)
    offload.wrap(model, optimizer, host_memory="64MiB")
    roomy = offload.runtime(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.5)
    roomy.load(point, scheduler)
    assert train(roomy, scheduler) == losses
    roomy.save(point.with_name("roomy"), scheduler)
    roomy.close()


def test_weights_alone_for_a_run_without_optimizer(
    trained: tuple[Runtime, Any, Path], spill: Path
) -> None:
    run, _, point = trained
    model = Net()
    offload.wrap(model, host_memory=BUDGET, disk=spill, tuning=Tuning(chunk_bytes=65536))
    reader = offload.runtime(model)
    with pytest.warns(UserWarning, match="scheduler"):
        reader.load(point)
    assert same(snapshot(reader), {k: v for k, v in snapshot(run).items() if "::" not in k})
    reader.close()


def test_files_are_plain_safetensors(trained: tuple[Runtime, Any, Path]) -> None:
    run, _, point = trained
    found: dict[str, Tensor] = {}
    for path in [*point.glob("weights-*"), *point.glob("optimizer-*")]:
        found |= load_file(path)
    assert same(found, snapshot(run))
    assert "embed.weight::exp_avg" in found
    assert "fleeting" not in found
    assert not [p for p in point.parent.iterdir() if p.name.startswith(".")]


def test_saving_in_mid_step_does_not_disturb_it(tmp_path: Path, spill: Path) -> None:
    def steps(save: bool) -> list[float]:
        run, scheduler = fresh(OPTIMIZERS["adamw"], spill)
        assert run.optimizer is not None
        losses = []
        for i in range(4):
            ids = torch.randint(0, VOCABULARY, (16,))
            loss = nn.functional.cross_entropy(run.model(ids), ids)
            if save and i == 2:
                run.save(tmp_path / "a", scheduler)
            torch.autograd.backward(loss)
            if save and i == 3:
                run.save(tmp_path / "a", scheduler)
            run.optimizer.step()
            run.optimizer.zero_grad()
            losses.append(loss.item())
        run.close()
        return losses

    assert steps(save=True) == steps(save=False)


def test_memory_of_save_and_load_is_within_the_budget(tmp_path: Path, spill: Path) -> None:
    run, scheduler = fresh(OPTIMIZERS["adamw"], spill)
    ledger = run.parts.engine.ledger
    train(run, scheduler, 1)
    for action in (
        lambda: run.save(tmp_path / "a", scheduler),
        lambda: run.load(tmp_path / "a", scheduler),
    ):
        ledger.peak_bytes = 0
        action()
        assert 0 < ledger.peak_bytes <= ledger.budget_bytes
        assert ledger.other_bytes == 0
    run.close()


# -- refusing -------------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def _shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "truncated": _shorten,
    "first byte": lambda p: _flip(p, 0),
    "middle": lambda p: _flip(p, p.stat().st_size // 2),
    "last byte": lambda p: _flip(p, -1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "file",
    [
        "manifest.json", "run.json", "values.safetensors",
        "weights-00001-of-00001.safetensors", "optimizer-00001-of-00001.safetensors",
    ],
)  # fmt: skip
def test_damage_is_found_before_anything_changes(
    trained: tuple[Runtime, Any, Path], file: str, damage: str
) -> None:
    run, scheduler, point = trained
    train(run, scheduler, 1)
    before = snapshot(run)
    DAMAGES[damage](point / file)
    with pytest.raises(CheckpointError, match=file):
        run.load(point, scheduler)
    assert same(snapshot(run), before)


def test_nothing_there(trained: tuple[Runtime, Any, Path], tmp_path: Path) -> None:
    run, scheduler, _ = trained
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        run.load(tmp_path / "nowhere", scheduler)


def test_another_model_or_optimizer(trained: tuple[Runtime, Any, Path], spill: Path) -> None:
    _, _, point = trained
    wide, scheduler = fresh(OPTIMIZERS["adamw"], spill, width=128)
    with pytest.raises(CheckpointError, match=r"embed\.weight|frozen") as caught:
        wide.load(point, scheduler)
    assert "[96, 96]" in str(caught.value) or "[200, 96]" in str(caught.value)
    wide.close()
    other, scheduler = fresh(OPTIMIZERS["sgd"], spill)
    with pytest.raises(CheckpointError, match=r"AdamW.*SGD"):
        other.load(point, scheduler)
    other.close()
    halved, scheduler = fresh(lambda m: torch.optim.AdamW(m.head.parameters()), spill)  # type: ignore[union-attr]
    with pytest.raises(CheckpointError, match="frozen is only in the checkpoint's"):
        halved.load(point, scheduler)
    halved.close()


def test_scheduler_that_was_not_saved(trained: tuple[Runtime, Any, Path], tmp_path: Path) -> None:
    run, scheduler, _ = trained
    run.save(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no scheduler"):
        run.load(tmp_path / "bare", scheduler)


def test_foreign_directories_are_not_replaced(
    trained: tuple[Runtime, Any, Path], tmp_path: Path
) -> None:
    run, _, _ = trained
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="photos holds other files"):
        run.save(tmp_path / "photos")
    with pytest.raises(CheckpointError, match="is a file"):
        run.save(tmp_path / "file")
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_what_cannot_be_saved_is_named(trained: tuple[Runtime, Any, Path], tmp_path: Path) -> None:
    run, _, _ = trained
    with pytest.raises(CheckpointError, match=r"extra\.hook is a function"):
        run.save(tmp_path / "b", extra={"hook": lambda: None})
    assert not (tmp_path / "b").exists()


# -- crashes --------------------------------------------------------------------------------


_SAVER = """
    import sys
    from pathlib import Path
    import torch
    import test_checkpoint as t
    folder = Path(sys.argv[1])
    run, scheduler = t.fresh(t.OPTIMIZERS["adamw"], folder / "spill")
    t.train(run, scheduler, 1)
    run.save(folder / "point", scheduler, {"save": 0})
    print("saved", flush=True)
    for i in range(1, 1000):
        with torch.no_grad():
            run.model.head.bias.fill_(i)
        run.save(folder / "point", scheduler, {"save": i})
"""


def test_kill_at_any_time_leaves_a_whole_checkpoint(tmp_path: Path, spill: Path) -> None:
    seen = set()
    for i in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_SAVER), str(tmp_path)],
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        )  # fmt: skip
        assert child.stdout is not None
        assert child.stdout.readline() == b"saved\n"
        time.sleep(0.023 * i)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        run, scheduler = fresh(OPTIMIZERS["adamw"], spill, seed=9)
        number = run.load(tmp_path / "point", scheduler)["save"]
        assert number == 0 or torch.all(run.model.head.bias == number)  # type: ignore[union-attr]
        seen.add(number)
        run.save(tmp_path / "point", scheduler, {"save": -1})  # what the crash left is no hindrance
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".point")]
        run.close()
    assert len(seen) > 1  # kills came at different stages


def test_every_failing_call_leaves_the_earlier_checkpoint(
    trained: tuple[Runtime, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fail the first, second, ... of the system calls of a save, until one save succeeds."""
    run, scheduler, point = trained
    run.save(point, scheduler, {"save": 0})
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename", "mkdir")}
    failures = 0
    while True:
        left = failures

        def failing(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == -1:
                    raise OSError(5, "Input/output error")
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, failing(name))
            try:
                run.save(point, scheduler, {"save": failures + 1})
                break
            except CheckpointError:
                pass
        failures += 1
        number = run.load(point, scheduler)["save"]
        assert number < failures or left < 0
    assert failures > 10
    assert run.load(point, scheduler)["save"] == failures + 1
    train(run, scheduler, 1)


def test_without_exchange_a_crash_between_renames_is_found(
    trained: tuple[Runtime, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scheduler, point = trained
    monkeypatch.setattr(publish, "_exchange", lambda *_: False)
    run.save(point, scheduler, {"save": 1})
    os.rename(point, point.with_name(f".{point.name}.previous"))  # the crash
    assert run.load(point, scheduler) == {"save": 1}
    run.save(point, scheduler, {"save": 2})
    assert run.load(point, scheduler) == {"save": 2}
    assert not [p for p in point.parent.iterdir() if p.name.startswith(f".{point.name}")]


def test_two_savers_do_not_mix(trained: tuple[Runtime, Any, Path]) -> None:
    run, scheduler, point = trained
    with (
        publish.replacing(point, lambda _: True),
        pytest.raises(CheckpointError, match="another process"),
    ):
        run.save(point, scheduler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs to mount a tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_full_disk(
    small_disk: Path, spill: Path, foreseen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, scheduler = fresh(OPTIMIZERS["adamw"], spill)
    train(run, scheduler, 1)
    run.save(small_disk / "point", scheduler, {"save": 1})
    (small_disk / "ballast").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - (1 << 20)))
    if not foreseen:
        monkeypatch.setattr("offload.checkpoint._check_space", lambda *_: None)
    match = "needs" if foreseen else "could not be written.*free at least"
    with pytest.raises(CheckpointError, match=match):
        run.save(small_disk / "point", scheduler, {"save": 2})
    assert not (small_disk / ".point.partial").exists()
    train(run, scheduler, 1)
    assert run.load(small_disk / "point", scheduler) == {"save": 1}
    run.close()


# -- parts ----------------------------------------------------------------------------------


def test_codec_gives_back_what_it_took() -> None:
    value = {
        "plain": [None, True, 1, -0.0, 1e-310, "ü", 2**70],
        "odd": (float("inf"), float("-inf"), ()),
        3: Counter({4: 2}),
        "$float": "not a tag",
        "tensor": torch.arange(3, dtype=torch.bfloat16),
        "array": np.arange(4, dtype=np.uint32),
        "number": np.float64(0.1),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "nested": {"a": {"b": (1, [2, {"c": 3}])}},
    }
    tensors: dict[str, Tensor] = {}
    back = decode(json.loads(json.dumps(encode(value, "v", tensors), allow_nan=False)), tensors)
    assert torch.equal(back.pop("tensor"), torch.arange(3, dtype=torch.bfloat16))
    array = back.pop("array")
    assert array.dtype == np.uint32
    assert array.tolist() == [0, 1, 2, 3]
    del value["tensor"], value["array"]
    assert back == value
    assert type(back[3]) is Counter
    assert np.isnan(decode(encode(float("nan"), "v", {}), {}))


def test_shards_keep_to_the_limit() -> None:
    specs = [Spec(str(i), torch.float32, (n,)) for i, n in enumerate((10, 5, 30, 1, 9, 10))]
    shards = shard(specs, 80)
    assert [[s.name for s in part] for part in shards] == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert shard([], 80) == []


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[-2,-1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with (
        HashingReader(path, FileRecord(path.stat().st_size, "")) as reader,
        pytest.raises(CheckpointError, match=r"x\.safetensors"),
    ):
        reader.read_header()


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.rand(2, 2), "c": torch.empty(0, 4)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with HashingReader(path, FileRecord(path.stat().st_size, "")) as reader:
        for spec in reader.read_header():
            raw = bytearray(reader.read(spec.size_bytes))
            if raw:
                found = torch.frombuffer(raw, dtype=spec.dtype).view(spec.shape)
                assert torch.equal(found, tensors[spec.name])
