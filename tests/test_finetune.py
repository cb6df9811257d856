"""The fine-tuning loop and command, over a stand-in engine that leaves tensors where they are."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload import cli
from offload.errors import CheckpointError, OffloadError
from offload.finetune import Outcome, finetune, lr_factor, make_optimizer
from offload.metrics import StepReport
from offload.progress import PlainProgress
from offload.runconfig import InputError, MemoryConfig, RunConfig, build_config
from offload.settings import read_yaml
from tests.tiny import WORDS, tiny_run, write_tiny_model


class InMemoryRuntime:
    """What the loop needs of a runtime, by torch.save."""

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._norm = float("nan")
        self.accumulated: list[int] = []
        if max_grad_norm is not None:
            self._max_norm = max_grad_norm
            optimizer.register_step_pre_hook(self._clip)

    def _clip(self, *_: object) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._max_norm)
        self._norm = float(norm)

    def stats(self) -> dict[str, Any]:
        held = {"host": {"used_bytes": 7 << 20, "budget_bytes": 8 << 20}}
        return {"bound_s": 1e-4, "tiers": held, "grad_norm": self._norm}

    def accumulate(self, micro_batches: Iterable[Any], loss_fn: Any) -> list[torch.Tensor]:
        losses = []
        for batch in micro_batches:
            losses.append(loss_fn(self._model, batch))
            losses[-1].backward()
        self.accumulated.append(len(losses))
        return losses

    def save(self, directory: Path, scheduler: Any, extra: dict[str, Any]) -> None:
        directory.mkdir(parents=True)
        (directory / "extra.json").write_text(json.dumps(extra))
        torch.save(
            {
                "model": self._model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "rng": torch.get_rng_state(),
            },
            directory / "state.pt",
        )

    def load(self, directory: Path, scheduler: Any) -> dict[str, Any]:
        try:
            state = torch.load(directory / "state.pt")
            extra: dict[str, Any] = json.loads((directory / "extra.json").read_text())
        except Exception as error:
            raise CheckpointError(f"{directory} is damaged") from error
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        return extra

    def export(self, directory: Path) -> None:
        self._model.save_pretrained(directory)

    def report(self, path: Path, *, task: str, history: Any) -> None:
        path.write_text(json.dumps({"task": task, "history": history}))

    def close(self) -> None:
        pass


class InMemoryEngine:
    """Plain PyTorch behind the engine's interface."""

    def load(self, model: str, dtype: torch.dtype, memory: MemoryConfig) -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)

    def init(self, factory: Callable[[], Any], memory: MemoryConfig) -> Any:
        return factory()

    def wrap(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig
    ) -> InMemoryRuntime:
        return InMemoryRuntime(model, optimizer, config.optimizer.max_grad_norm or None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> RunConfig:
    return tiny_run(tiny_model, tmp_path)


class StopAt(PlainProgress):
    """An observer that presses Ctrl-C during a given step."""

    def __init__(self, step: int) -> None:
        super().__init__(StringIO())
        self._at = step
        self.notes: list[str] = []

    def step(self, report: StepReport) -> None:
        if report.step == self._at:
            signal.raise_signal(signal.SIGINT)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)


def _run(config: RunConfig, *, resume: bool = False, stop_at: int = -1) -> Outcome:
    return finetune(config, resume=resume, observer=StopAt(stop_at), engine=InMemoryEngine())


def _metrics(config: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _numbers(config: RunConfig) -> list[tuple[Any, ...]]:
    keys = ("step", "loss", "lr", "grad_norm", "eval_loss")
    return [tuple(row.get(key) for key in keys) for row in _metrics(config)]


def _weights(config: RunConfig) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(Path(config.output) / "model")
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_an_interrupted_run_goes_on_bit_exactly(config: RunConfig, stop_at: int) -> None:
    whole = replace(config, output=config.output + "-whole")
    finished = _run(whole)
    assert (finished.step, finished.stopped_by) == (6, None)
    stopped = _run(config, stop_at=stop_at)
    assert (stopped.step, stopped.stopped_by) == (stop_at, signal.SIGINT)
    assert stopped.model_directory is None
    assert _run(config, resume=True).step == 6
    assert _numbers(config) == _numbers(whole)
    assert [row["step"] for row in _metrics(config)] == [1, 2, 3, 4, 5, 6]
    ours, theirs = _weights(config), _weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_run_drops_the_lines_of_lost_steps(config: RunConfig) -> None:
    whole = replace(config, output=config.output + "-whole")
    _run(whole)
    _run(config, stop_at=5)
    run = Path(config.output)
    newest = run / "checkpoints" / "step-000005"
    (newest / "state.pt").write_bytes(b"torn")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "lo')
    observer = StopAt(-1)
    finetune(config, resume=True, observer=observer, engine=InMemoryEngine())
    assert any("skipped checkpoint step-000005" in note for note in observer.notes)
    assert any("resumed after step 4" in note for note in observer.notes)
    assert _numbers(config) == _numbers(whole)


def test_the_loss_falls_and_the_export_loads_in_plain_transformers(config: RunConfig) -> None:
    longer = replace(config, schedule=replace(config.schedule, steps=30))
    outcome = _run(longer)
    losses = [row["loss"] for row in _metrics(config)]
    assert losses[-1] < losses[0] - 0.5
    assert outcome.eval_loss is not None
    assert outcome.model_directory is not None
    tokenizer = AutoTokenizer.from_pretrained(outcome.model_directory)
    model = AutoModelForCausalLM.from_pretrained(outcome.model_directory)
    prompt = tokenizer("the quick", return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert made.shape[1] == prompt["input_ids"].shape[1] + 4


def test_metrics_and_checkpoints_are_as_promised(config: RunConfig) -> None:
    _run(config)
    rows = _metrics(config)
    assert [row["lr"] for row in rows] == [1e-2 * lr_factor(s, 2, 6) for s in range(6)]
    assert rows[0]["tokens"] == 2 * 2 * 32
    assert rows[0]["tier_bytes"] == {"host": 7 << 20}
    assert {"loss", "lr", "grad_norm", "step_s", "tokens_per_s", "bound_s"} <= rows[0].keys()
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    kept = sorted(p.name for p in (Path(config.output) / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]


def test_the_written_configuration_reproduces_the_run(config: RunConfig) -> None:
    _run(config)
    again = build_config(read_yaml(Path(config.output) / "config.yaml", RunConfig))
    assert again == config
    other = replace(again, output=config.output + "-again")
    _run(other)
    assert _numbers(other) == _numbers(config)


def test_accumulation_is_the_mean_over_tokens_not_of_means(config: RunConfig) -> None:
    """Conversations differ in learned tokens per block; a mean of means would differ too."""
    path = Path(config.output).parent / "chat.jsonl"
    rows = [
        {"instruction": WORDS[: 5 + 7 * (i % 9)], "output": WORDS[: 3 + 11 * (i % 7)]}
        for i in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    still = replace(config.schedule, steps=1, warmup=0, eval_every=0, save_every=0)
    losses = []
    for size, accumulate in ((4, 1), (1, 4)):
        data = replace(config.data, path=str(path), batch_size=size, accumulate=accumulate)
        one = replace(config, data=data, schedule=still, output=f"{config.output}-{size}")
        losses.append(finetune(one, observer=StopAt(-1), engine=_NoDropout()).loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class _NoDropout(InMemoryEngine):
    def load(self, model: str, dtype: torch.dtype, memory: MemoryConfig) -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attention_dropout=0.0)


def test_the_micro_batches_of_a_step_are_accumulated_together(config: RunConfig) -> None:
    engine = _Remembering()
    longer = replace(config, data=replace(config.data, accumulate=3, batch_size=1))
    finetune(longer, observer=StopAt(2), engine=engine)
    assert engine.made is not None
    assert engine.made.accumulated == [3, 3]


class _Remembering(InMemoryEngine):
    made: InMemoryRuntime | None = None

    def wrap(self, *given: Any) -> InMemoryRuntime:
        self.made = super().wrap(*given)
        return self.made


def test_resume_with_other_settings_is_refused(config: RunConfig) -> None:
    _run(config, stop_at=2)
    other = replace(config, optimizer=replace(config.optimizer, lr=0.5))
    with pytest.raises(InputError, match=r"optimizer\.lr 0\.01 \(now 0\.5\)"):
        _run(other, resume=True)
    Path(config.data.path or "").write_text(WORDS * 39)
    with pytest.raises(InputError, match="data content"):
        _run(config, resume=True)


def test_budgets_and_length_may_change_on_resume(config: RunConfig) -> None:
    _run(config, stop_at=2)
    memory = MemoryConfig(host_memory="1GiB")
    longer = replace(config, memory=memory, schedule=replace(config.schedule, steps=8))
    assert _run(longer, resume=True).step == 8


def test_resume_without_a_checkpoint_starts_and_with_damaged_ones_stops(config: RunConfig) -> None:
    assert _run(config, resume=True, stop_at=2).step == 2
    for state in Path(config.output).glob("checkpoints/*/state.pt"):
        state.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        _run(config, resume=True)


def test_a_second_run_does_not_overwrite_the_first(config: RunConfig) -> None:
    _run(config, stop_at=1)
    with pytest.raises(InputError, match="--resume"):
        _run(config)


def test_a_loss_that_is_not_finite_stops_the_run(config: RunConfig) -> None:
    wild = replace(
        config, optimizer=replace(config.optimizer, lr=1e30, max_grad_norm=0.0, weight_decay=0.0)
    )
    with pytest.raises(OffloadError, match=r"the loss is (nan|inf) at step"):
        _run(wild)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in _metrics(config))


def test_matrices_decay_and_norms_do_not(config: RunConfig) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model)
    decayed, plain = make_optimizer(model, config).param_groups
    assert decayed["weight_decay"] == 0.01
    assert plain["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])


def test_learning_rate_curve() -> None:
    factors = [lr_factor(s, 4, 20) for s in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b > 0 for a, b in pairwise(factors[4:]))
    assert lr_factor(20, 4, 20) == pytest.approx(0.0)
    assert lr_factor(12, 4, 20) == pytest.approx(0.5)


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run ``offload ARGUMENTS`` in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["offload", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


BAD_INPUT: list[tuple[str, list[str], list[str]]] = [
    ("missing data", ["--data", "{tmp}/none.jsonl"], ["no data at", "--data"]),
    ("empty data", ["--data", "{tmp}/empty.txt"], ["no text in"]),
    ("bad record", ["--data", "{tmp}/bad.jsonl"], ["bad.jsonl:1", "needs 'text'"]),
    ("too little data", ["--data", "{tmp}/short.txt"], ["fewer than one sequence", "--seq-len"]),
    ("unknown yaml key", ["--config", "{tmp}/typo.yaml"], ["'optimizer.lrr'", "optimizer.lr'"]),
    ("missing yaml", ["--config", "{tmp}/none.yaml"], ["cannot read the configuration"]),
    ("missing model", ["--model", "{tmp}/nomodel"], ["no model directory"]),
    ("model without config", ["--model", "{tmp}"], ["no config.json"]),
    ("too long", ["--seq-len", "65"], ["64 positions", "--seq-len 64"]),
    ("output in a file", ["--output", "{tmp}/short.txt/run"], ["cannot write in", "--output"]),
    ("spill in a file", ["--disk", "{tmp}/short.txt/x"], ["spill directory", "--disk"]),
    ("disk too small", ["--disk", "{tmp}", "--disk-memory", "999TiB"], ["free", "--disk"]),
    ("bad size", ["--host-memory", "lots"], ["memory.host_memory", "8GiB"]),
    ("bad number", ["--lr", "-1"], ["optimizer.lr", "at least 0"]),
]


@pytest.mark.parametrize(
    ("flags", "parts"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input_is_one_line_and_status_2(
    config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    flags: list[str],
    parts: list[str],
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "typo.yaml").write_text("optimizer:\n  lrr: 1\n")
    base = ["--model", config.model, "--data", str(config.data.path), "--output", config.output]
    given = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    status = _command(monkeypatch, "finetune", *base, "--seq-len", "32", *given)
    captured = capfd.readouterr()
    assert status == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err


def test_no_room_for_checkpoints_is_found_first(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("offload.preflight.shutil.disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="free space or choose another --output"):
        _run(config)


def test_command_line_end_to_end(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("offload.finetune.OffloadEngine", InMemoryEngine)
    flags = ["--model", config.model, "--data", str(config.data.path), "--output", config.output]
    run = ["finetune", *flags, "--seq-len", "32", "--steps", "3", "--json"]
    assert _command(monkeypatch, *run) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["begin", "step", "step", "step", "done"]
    own = os.path.join(config.output, "config.yaml")
    assert _command(monkeypatch, "finetune", "--config", own, "--resume", "--steps", "5") == 0
    out = capsys.readouterr().out
    assert "resumed after step 3" in out
    assert "step 5/5" in out
