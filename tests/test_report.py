"""The report: memory by kind is the ledger's, bytes the lanes', seconds the step's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import offload
from offload.config import Tuning
from offload.errors import OffloadError
from offload.prefetch.trace import Access, Need, Phase
from offload.report import report_data
from offload.report_memory import KINDS, thinned
from offload.report_step import LaneRows, Row, join_short
from offload.report_tables import Tables
from offload.run import Runtime
from offload.steps import Kind
from offload.tape import Mark
from offload.tiers.spec import MIB
from offload.timeline import Levels, segments
from tests.blocks import start, train
from tests.conftest import CHUNK_BYTES, MACHINE, adamw
from tests.framed import Watched, tuning

if TYPE_CHECKING:
    from tests.conftest import Manager, Zoo

HOST_BYTES = 800_000


def steps(model: Any, optimizer: Optimizer, count: int = 5, micro: int = 1) -> None:
    """Plain training without clipping."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for _ in range(micro):
            ids = torch.randint(0, 192, (2, 12), generator=generator)
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def check(run: Runtime, kind: Kind = Kind.TRAIN) -> dict[str, Any]:
    """All that must be true of any report with a step; its data."""
    data: dict[str, Any] = json.loads(json.dumps(report_data(run), allow_nan=False))
    step = data["step"]
    for memory in step["memory"].values():
        check_memory(memory, step["step_s"])
    check_last_sample(run, step["memory"]["host"])
    check_bytes(run, data, kind)
    check_seconds(data)
    assert len(json.dumps(data)) < 2 * MIB
    return data


def check_memory(memory: dict[str, Any], step_s: float) -> None:
    assert set(memory["kinds"]) == set(KINDS)
    assert all(min(column) >= 0 for column in memory["kinds"].values())
    sums = [sum(row) for row in zip(*memory["kinds"].values(), strict=True)]
    assert sums == memory["used_bytes"]
    assert memory["budget_bytes"] is None or max(sums) <= memory["budget_bytes"]
    assert all(a <= b for a, b in pairwise(memory["t_s"]))
    assert (memory["t_s"][0], memory["t_s"][-1]) == (0.0, step_s)


def check_last_sample(run: Runtime, memory: dict[str, Any]) -> None:
    """The account by changes ends where the frames are: nothing has happened since the step."""
    rows, chunks = Tables(run.model, run.parts).chunks, run.parts.engine.space.chunks
    held = Counter[str]()
    for row, chunk in zip(rows, chunks, strict=True):
        if chunk.frame is not None or not row.on_disk:
            held[row.kind] += chunk.size_bytes
    for kind in ("weights", "optimizer"):
        assert memory["kinds"][kind][-1] == held[kind]


def check_bytes(run: Runtime, data: dict[str, Any], kind: Kind) -> None:
    lanes = data["step"]["lanes"]
    moved = run.parts.steps.tracks[kind].replayed_bytes
    for name in ("read", "write"):
        lane = lanes.get(name, {"bytes": 0, "spans": {"bytes": [], "chunk": []}})
        assert lane["bytes"] == sum(lane["spans"]["bytes"])
        if moved[name]:
            assert lane["bytes"] == moved[name][-1]
        spans = zip(lane["spans"]["bytes"], lane["spans"]["chunk"], strict=True)
        assert sum(m[f"{name}_bytes"] for m in data["modules"]) == sum(
            b for b, c in spans if c >= 0
        )


def check_seconds(data: dict[str, Any]) -> None:
    step, modules = data["step"], data["modules"]
    stalls = [(a, b) for a, b in zip(step["stalls"]["start_s"], step["stalls"]["end_s"],
                                     strict=True)]  # fmt: skip
    busy = {n: lane["busy_s"] for n, lane in step["lanes"].items() if n in ("compute", "update")}
    total_s = sum(b - a for a, b in stalls) + sum(busy.values())
    assert total_s == pytest.approx(step["step_s"], rel=0.02)
    own_s = sum(m["compute_s"] + m["stall_s"] for m in modules)
    assert 0 < own_s <= 1.01 * step["step_s"]
    whole = sorted(
        [
            *stalls,
            *(
                s
                for n in busy
                for s in zip(
                    step["lanes"][n]["spans"]["start_s"],
                    step["lanes"][n]["spans"]["end_s"],
                    strict=True,
                )
            ),
        ]
    )
    assert all(b[0] == pytest.approx(a[1], abs=3e-6) for a, b in pairwise(whole))
    for lane in step["lanes"].values():
        spans = zip(lane["spans"]["start_s"], lane["spans"]["end_s"], strict=True)
        assert all(0 <= a <= b <= step["step_s"] for a, b in spans)
    phases = step["phases"]
    assert phases[0]["start_s"] == 0.0
    assert phases[-1]["end_s"] == step["step_s"]
    assert all(a["end_s"] == b["start_s"] for a, b in pairwise(phases))


def names(data: dict[str, Any]) -> list[str]:
    return [phase["name"] for phase in data["step"]["phases"]]


@pytest.mark.parametrize("adversary", [None, 3])
def test_training_from_disk(zoo: Zoo, manage: Manager, adversary: int | None) -> None:
    model: Any = zoo.build("llama-tied")
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=HOST_BYTES, adversary=adversary)
    steps(model, optimizer)
    data = check(run)
    assert data["task"] == "train"
    assert names(data) == ["forward", "backward", "update"]
    assert data["verdict"]["ratio"] > 0
    kinds = data["step"]["memory"]["host"]["kinds"]
    assert all(max(kinds[k]) for k in ("weights", "gradients", "optimizer", "activations"))
    assert data["history"]["step"] == [2, 3, 4, 5]
    assert data["forecast"].keys() == data["measured"].keys()
    computed = {m["name"] for m in data["modules"] if m["compute_s"] > 0}
    assert {"model.layers.0.self_attn.q_proj", "model.norm"} <= computed
    homes = Counter(home for m in data["modules"] for home in m["home_bytes"])
    assert homes["disk"]


def test_updates_in_the_backward_pass(zoo: Zoo, manage: Manager) -> None:
    model: Any = zoo.build("llama")
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=HOST_BYTES, step_in_backward=True)
    steps(model, optimizer, 6)
    data = check(run)
    assert run.parts.early is not None
    assert run.parts.early.active
    update = data["step"]["lanes"]["update"]["spans"]
    backward = next(p for p in data["step"]["phases"] if p["name"] == "backward")
    assert any(backward["start_s"] < s < backward["end_s"] for s in update["start_s"])
    assert not any("step_in_backward" in line for line in data["verdict"]["advice"])


def test_two_micro_batches(zoo: Zoo, manage: Manager) -> None:
    model: Any = zoo.build("gpt2", "reentrant")
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=HOST_BYTES)
    steps(model, optimizer, micro=2)
    assert names(check(run)) == ["forward", "backward"] * 2 + ["update"]


@pytest.mark.parametrize("disk", [True, False])
def test_everything_fits(zoo: Zoo, tmp_path: Path, disk: bool) -> None:
    model: Any = zoo.build("llama")
    optimizer = adamw(list(model.parameters()))
    how = Tuning(chunk_bytes=CHUNK_BYTES, machine=MACHINE)
    folder = tmp_path if disk else None
    offload.wrap(model, optimizer, host_memory=32 * MIB, disk=folder, tuning=how)
    with offload.runtime(model) as run:
        steps(model, optimizer, 6)
        data = check(run)
        assert "read" not in data["step"]["lanes"]
        assert {home for m in data["modules"] for home in m["home_bytes"]} == {"host"}
        assert max(data["step"]["memory"]["host"]["kinds"]["optimizer"]) > 0


def test_swapped_activations(manage: Manager) -> None:
    model, optimizer = start()
    run = manage(model, optimizer, host_bytes=6 * MIB, activations="swap")
    train(model, optimizer, steps=5)
    data = check(run)
    assert data["step"]["memory"]["disk"]["kinds"]["activations"][0] > 0
    spans = data["step"]["lanes"]["write"]["spans"]
    assert -1 in spans["chunk"]


def test_three_tiers(zoo: Zoo, tmp_path: Path) -> None:
    model: Any = zoo.build("llama")
    optimizer = adamw(list(model.parameters()))
    watched = Watched(model, tmp_path, optimizer, how=tuning(None), compute_dtype=torch.bfloat16)
    steps(model, optimizer)
    watched.check_tiers()
    data = check(watched.runtime)
    assert set(data["step"]["memory"]) == {"host", "device", "disk"}
    kinds = data["step"]["memory"]["device"]["kinds"]
    assert max(kinds["weights"]) > 0
    assert max(kinds["activations"]) > 0
    assert {"h2d", "d2h", "read", "write", "compute", "update"} == set(data["step"]["lanes"])
    tape = watched.device.steps.tracks[Kind.TRAIN].tape
    assert tape is not None
    uploaded = sum(size for *_, size in tape.lanes["read"])
    assert data["step"]["lanes"]["h2d"]["bytes"] == uploaded > 0
    assert data["machine"]["device"] == "emulated"
    assert names(data) == ["forward", "backward", "update"]
    watched.close()


def test_an_evaluation_in_between_is_no_example(zoo: Zoo, manage: Manager) -> None:
    model: Any = zoo.build("llama")
    optimizer = adamw(list(model.parameters()))
    run = manage(model, optimizer, host_bytes=HOST_BYTES)
    steps(model, optimizer)
    before = run.parts.steps.tracks[Kind.TRAIN].tape
    ids = torch.zeros((2, 12), dtype=torch.int64)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        model(input_ids=ids)
    loss.backward()
    optimizer.step()
    assert run.parts.steps.tracks[Kind.TRAIN].tape is before
    assert run.parts.engine.tape is None
    assert run.parts.engine.ledger.seen is None
    optimizer.zero_grad()
    steps(model, optimizer, 1)
    assert run.parts.steps.tracks[Kind.TRAIN].tape is not before
    check(run)


def test_nothing_is_noted_where_it_is_not_asked_for(zoo: Zoo, tmp_path: Path) -> None:
    model: Any = zoo.build("llama")
    optimizer = adamw(list(model.parameters()))
    how = Tuning(chunk_bytes=CHUNK_BYTES, machine=MACHINE, tapes=False)
    offload.wrap(model, optimizer, host_memory=HOST_BYTES, disk=tmp_path, tuning=how)
    with offload.runtime(model) as run:
        steps(model, optimizer, 3)
        data = report_data(run)
    assert data["step"] is None
    assert data["measured"] is None
    assert "no step" in data["verdict"]["text"]


class Owned:
    """Chunk c belongs to modules c and, where it is odd, c - 1."""

    def __init__(self) -> None:
        self.index = {"a": 0, "b": 1, "frozen": 2, "c": 3}

    def module_of(self, parameter: str) -> int:
        return self.index.get(parameter.rpartition(".")[0], -1)

    def users(self, chunks: Iterable[int]) -> dict[int, int]:
        return {m: 1 for c in chunks for m in ((c, c - 1) if c % 2 else (c,))}


def tape_of(moments: list[Any], stalls: list[Any], marks: list[Any], end_s: float) -> Any:
    needed = [(a, b, phase, tuple(Need(c, Access.READ) for c in chunks))
              for a, b, phase, chunks in moments]  # fmt: skip
    return SimpleNamespace(began_s=0.0, ended_s=end_s, moments=needed, stalls=stalls, marks=marks)


def test_each_second_is_for_somebody() -> None:
    forward, backward, update = Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE
    tape = tape_of(
        [
            (1, 2, forward, (0,)), (3, 6, forward, (1,)), (10, 11, backward, (3,)),
            (12, 13, backward, (2,)), (14, 15, backward, (1,)), (20, 21, update, (1,)),
        ],
        [(3.5, 5, "read", 1), (25, 26, "write", 0)],
        [
            (1, Mark.MODULE, "a"), (3, Mark.MODULE, "b"), (8, Mark.FORWARD_ENDS, ""),
            (11.5, Mark.GRADIENT, "c.weight"), (16, Mark.GRADIENT, "b.weight"),
            (17, Mark.GRADIENT, "a.weight"), (23, Mark.UPDATED, ""),
        ],
        26,
    )  # fmt: skip
    found = [(s.start_s, s.end_s, s.lane, s.cause, s.phase, s.module)
             for s in segments(Levels(tape), Owned())]  # fmt: skip
    assert found == [
        (0, 1, "compute", None, forward, -1),  # before any module
        (1, 2, "stalls", "engine", forward, 0),
        (2, 3, "compute", None, forward, 0),
        (3, 3.5, "stalls", "engine", forward, 1),
        (3.5, 5, "stalls", "read", forward, 1),
        (5, 6, "stalls", "engine", forward, 1),
        (6, 8, "compute", None, forward, 1),
        (8, 10, "compute", None, backward, -1),  # the loss
        (10, 11, "stalls", "engine", backward, 3),
        (11, 11.5, "compute", None, backward, 3),
        (11.5, 12, "compute", None, backward, 1),
        (12, 13, "stalls", "engine", backward, 2),  # frozen: no gradient of its own
        (13, 14, "compute", None, backward, 2),
        (14, 15, "stalls", "engine", backward, 1),
        (15, 16, "compute", None, backward, 1),
        (16, 17, "compute", None, backward, 0),
        (17, 20, "compute", None, backward, -1),  # the user's
        (20, 21, "stalls", "engine", update, 0),
        (21, 23, "update", None, update, 0),
        (23, 25, "update", None, update, 0),
        (25, 26, "stalls", "write", update, 0),
    ]


def test_a_frame_waits_for_the_disk_below() -> None:
    """The device's moments say what is done; the host's are within."""
    host = tape_of(
        [(1.5, 3, Phase.BACKWARD, (1,)), (8, 9, Phase.UPDATE, (0,))], [(2, 2.5, "read", 1)],
        [(1, Mark.MODULE, "a")], 10,
    )  # fmt: skip
    device = tape_of([(1, 5, Phase.FORWARD, (0,))], [(2.2, 2.4, "read", 0), (4, 5, "read", 0)],
                     [], 6)  # fmt: skip
    found = segments(Levels(host, device, [(1, 3)]), Owned())
    assert [(s.start_s, s.end_s, s.cause, s.chunk, s.phase) for s in found] == [
        (0, 1, None, -1, Phase.FORWARD),
        (1, 2, "engine", -1, Phase.FORWARD),
        (2, 2.5, "read", 1, Phase.FORWARD),
        (2.5, 4, "engine", -1, Phase.FORWARD),
        (4, 5, "upload", 1, Phase.FORWARD),
        (5, 8, None, -1, Phase.FORWARD),
        (8, 9, "engine", -1, Phase.UPDATE),
        (9, 10, None, -1, Phase.UPDATE),
    ]


def test_short_spans_are_joined_and_bytes_are_kept() -> None:
    rows = [Row(i * 1e-3, i * 1e-3 + 9e-4, i % 3, 7, 1, "read") for i in range(1000)]
    joined, resolution_s = join_short({"read": rows}, 1.0, most=100)
    assert resolution_s > 0
    assert len(joined["read"]) <= 100
    assert sum(r.size_bytes for r in joined["read"]) == 7000
    assert joined["read"][0].start_s == rows[0].start_s
    assert joined["read"][-1].end_s == rows[-1].end_s
    assert joined["read"][0].chunk == -1
    assert joined["read"][0].module == 1
    assert join_short({"read": rows}, 1.0, most=1000) == ({"read": rows}, 0.0)
    assert LaneRows(rows).busy_s == pytest.approx(0.9)


def test_thinning_keeps_the_peak() -> None:
    values = [i % 17 for i in range(1000)]
    values[333] = 99
    kept = thinned(values, 50)
    assert len(kept) <= 50
    assert {0, 333, 999} <= set(kept)
    assert kept == sorted(set(kept))
    assert thinned(values, 1000) == list(range(1000))


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_other_names_are_refused(manage: Manager, tmp_path: Path, name: str) -> None:
    run = manage(nn.Linear(4, 4))
    with pytest.raises(OffloadError, match=r"ends in \.html, \.json"):
        run.report(tmp_path / name)
    assert not list(tmp_path.glob("report*"))
