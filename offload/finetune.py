"""Fine-tuning: a plain PyTorch loop over a managed model, that can stop and go on bit-exactly.

Nothing here knows where a tensor is. Micro-batches go through ``runtime.accumulate``, the rest is
written as anyone would; the engine is reached through the functions of ``Engine`` and ``Runtime``,
which ``offload`` itself provides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch.optim.lr_scheduler import LambdaLR

from offload.config import Tuning
from offload.data import Blocks, Position, Sampler
from offload.errors import CheckpointError, OffloadError
from offload.interrupt import Interrupt
from offload.metrics import MetricsLog, StepReport
from offload.preflight import Job, prepare
from offload.progress import Observer, PlainProgress
from offload.runconfig import InputError, MemoryConfig, RunConfig
from offload.rundir import replacing
from offload.runreport import Reports, report_run
from offload.settings import changed

EVAL_BATCHES = 16  # enough for a steady mean; each one streams the whole model

B = TypeVar("B")


class Runtime(Reports, Protocol):
    """The part of ``offload.runtime(model)`` that the loop uses."""

    def stats(self) -> dict[str, Any]: ...
    def accumulate(
        self, micro_batches: Iterable[B], loss_fn: Callable[[torch.nn.Module, B], torch.Tensor], /
    ) -> list[torch.Tensor]: ...
    def save(self, directory: Path, scheduler: Any, extra: dict[str, Any], /) -> None: ...
    def load(self, directory: Path, scheduler: Any, /) -> dict[str, Any]: ...
    def export(self, directory: Path, /) -> None: ...
    def close(self) -> None: ...


class Engine(Protocol):
    """Where models come from and who moves their bytes; tests give a stand-in."""

    def load(self, model: str, dtype: torch.dtype, memory: MemoryConfig) -> torch.nn.Module: ...
    def init(self, factory: Callable[[], Any], memory: MemoryConfig) -> torch.nn.Module: ...
    def wrap(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig
    ) -> Runtime: ...


class OffloadEngine:
    """The real one. ``tuning``: internals, for tests."""

    def __init__(self, tuning: Tuning | None = None) -> None:
        self._tuning = tuning

    def load(self, model: str, dtype: torch.dtype, memory: MemoryConfig) -> torch.nn.Module:
        import transformers

        import offload

        told = {"tuning": self._tuning, "model_class": transformers.AutoModelForCausalLM}
        told |= asdict(memory)
        managed: torch.nn.Module = offload.from_pretrained(model, dtype=dtype, **told)
        return managed

    def init(self, factory: Callable[[], Any], memory: MemoryConfig) -> torch.nn.Module:
        import offload

        managed: torch.nn.Module = offload.init(factory, tuning=self._tuning, **asdict(memory))
        return managed

    def wrap(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig
    ) -> Runtime:
        import offload

        # The budgets are those the model was made with.
        told = config.optimizer
        offload.wrap(
            model, optimizer, max_grad_norm=told.max_grad_norm or None, tuning=self._tuning,
            step_in_backward=told.step_in_backward, state_dtype=told.state_dtype,
        )  # fmt: skip
        return offload.runtime(model)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. ``stopped_by`` is the signal that asked it to stop, or None."""

    step: int
    loss: float | None
    eval_loss: float | None
    model_directory: Path | None
    stopped_by: int | None = None


@dataclass(slots=True)
class _Session:
    """The objects of one run; only ``step`` changes."""

    job: Job
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    runtime: Runtime
    sampler: Sampler
    step: int = 0


def finetune(
    config: RunConfig,
    *,
    resume: bool = False,
    observer: Observer | None = None,
    engine: Engine | None = None,
) -> Outcome:
    """Run ``config`` to its last step, or until the first Ctrl-C, and export the model.

    With ``resume`` the run goes on after its newest valid checkpoint: losses and weights are
    those of the run that was never stopped. Raises OffloadError for what cannot work; bad
    input is found before the model is built.
    """
    observer = observer or PlainProgress()
    job = prepare(config, resume=resume)
    observer.note(describe(job))
    session = _build(job, engine or OffloadEngine())
    try:
        if resume:
            _restore(session, observer)
        job.rundir.write_config(config)
        outcome = _train(session, observer)
        if outcome.stopped_by is None:
            outcome = _finish(session, outcome, observer)
        return outcome
    finally:
        observer.close()
        session.runtime.close()


def lr_factor(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up over ``warmup`` steps, then half a cosine that reaches 0 after ``steps``."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def describe(job: Job) -> str:
    """The run in one line."""
    held_out = f", {len(job.held_out):,} held out" if len(job.held_out) else ""
    return (
        f"{job.config.model}: {len(job.train):,} sequences of "
        f"{job.config.data.seq_len} tokens{held_out}"
    )


def _build(job: Job, engine: Engine) -> _Session:
    config = job.config
    torch.manual_seed(config.compute.seed)
    dtype: torch.dtype = getattr(torch, config.compute.dtype)
    if job.factory is None:
        model = engine.load(config.model, dtype, config.memory)
    else:
        model = engine.init(job.factory, config.memory)
    if config.compute.gradient_checkpointing:
        _checkpoint_activations(model)
    optimizer = make_optimizer(model, config)
    schedule = config.schedule
    scheduler = LambdaLR(optimizer, lambda s: lr_factor(s, schedule.warmup, schedule.steps))
    runtime = engine.wrap(model, optimizer, config)
    sampler = Sampler(len(job.train), config.compute.seed)
    return _Session(job, model.train(), optimizer, scheduler, runtime, sampler)


def _checkpoint_activations(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def make_optimizer(
    model: torch.nn.Module, config: RunConfig, *, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW; matrices decay, biases and norms do not. ``fused``: not for models without data."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.dim() >= 2],
            "weight_decay": config.optimizer.weight_decay,
        },
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.optimizer.lr, fused=fused)


def _train(session: _Session, observer: Observer) -> Outcome:
    """Step until the last one or a signal; save at both."""
    schedule = session.job.config.schedule
    report: StepReport | None = None
    saved_step = session.step
    with (
        MetricsLog(session.job.rundir.metrics, after_step=session.step) as log,
        Interrupt() as interrupt,
    ):
        observer.begin(session.step, schedule.steps)
        while session.step < schedule.steps and interrupt.signal is None:
            report = _step(session)
            log.write(report)
            observer.step(report)
            if schedule.save_every and session.step % schedule.save_every == 0:
                saved_step = _save(session)
                report_run(session.runtime, session.job.rundir, observer)
        if saved_step != session.step and (schedule.save_every or interrupt.signal):
            _save(session)
    if report is not None:
        report_run(session.runtime, session.job.rundir, observer)
    loss, eval_loss = (report.loss, report.eval_loss) if report else (None, None)
    stopped = session.step < schedule.steps
    return Outcome(session.step, loss, eval_loss, None, interrupt.signal if stopped else None)


def _step(session: _Session) -> StepReport:
    """One optimizer step over ``accumulate`` micro-batches, and its report."""
    config = session.job.config
    started_s = time.perf_counter()
    rows = session.sampler.take(config.data.batch_size * config.data.accumulate)
    loss = _forward_backward(session, rows)
    if not math.isfinite(loss):
        raise OffloadError(
            f"the loss is {loss} at step {session.step + 1}; lower --lr or set --max-grad-norm, "
            "and go on from the last checkpoint with --resume"
        )
    lr = float(session.scheduler.get_last_lr()[0])
    session.optimizer.step()
    session.scheduler.step()
    session.optimizer.zero_grad()
    step_s = time.perf_counter() - started_s
    session.step += 1
    stats = session.runtime.stats()
    return StepReport(
        step=session.step,
        loss=loss,
        lr=lr,
        tokens=len(rows) * config.data.seq_len,
        step_s=step_s,
        bound_s=stats.get("bound_s"),
        grad_norm=stats.get("grad_norm"),
        eval_loss=_evaluate(session) if _eval_is_due(session) else None,
        tier_bytes={tier: held["used_bytes"] for tier, held in stats.get("tiers", {}).items()},
        steady=stats.get("step_s") is not None,
    )


def _forward_backward(session: _Session, rows: list[int]) -> float:
    """Mean loss over all learned tokens of ``rows``; leaves its gradient in the parameters.

    Micro-batches are weighted by their learned tokens, so that accumulation computes the loss
    of the whole batch and not a mean of means.
    """
    blocks, size = session.job.train, session.job.config.data.batch_size
    targets = _target_count(blocks, rows)

    def weighted(_: torch.nn.Module, chosen: list[int]) -> torch.Tensor:
        return _loss(session, blocks, chosen) * (_target_count(blocks, chosen) / targets)

    micro_batches = [rows[first : first + size] for first in range(0, len(rows), size)]
    return sum(loss.item() for loss in session.runtime.accumulate(micro_batches, weighted))


def _target_count(blocks: Blocks, rows: list[int]) -> int:
    return int(blocks.learned[rows, 1:].sum())  # the first token of a row is never predicted


def _loss(session: _Session, blocks: Blocks, rows: list[int]) -> torch.Tensor:
    """Mean loss, [], over the learned tokens of ``rows``."""
    input_ids = torch.from_numpy(blocks.input_ids(rows))  # [rows, seq_len]
    labels = torch.from_numpy(blocks.labels(rows))  # [rows, seq_len]
    # No cache of casts: it would hold a copy of every weight until the end of the pass.
    mixed = torch.autocast(
        input_ids.device.type,
        torch.bfloat16,
        enabled=session.job.config.compute.bf16,
        cache_enabled=False,
    )
    with mixed:
        output = session.model(input_ids=input_ids, labels=labels, use_cache=False)
    loss: torch.Tensor = output.loss
    return loss


def _eval_is_due(session: _Session) -> bool:
    schedule = session.job.config.schedule
    if not schedule.eval_every or not len(session.job.held_out):
        return False
    return session.step % schedule.eval_every == 0 or session.step == schedule.steps


@torch.no_grad()
def _evaluate(session: _Session) -> float:
    """Mean loss over the learned tokens of the held-out blocks, at most EVAL_BATCHES batches.

    Only full batches, unless there is none: another shape would need another plan.
    """
    blocks, size = session.job.held_out, session.job.config.data.batch_size
    usable = max(len(blocks) - len(blocks) % size, min(len(blocks), size))
    total, targets = 0.0, 0
    session.model.eval()
    for first in range(0, min(usable, EVAL_BATCHES * size), size):
        rows = list(range(first, min(first + size, usable)))
        count = _target_count(blocks, rows)
        total += _loss(session, blocks, rows).item() * count
        targets += count
    session.model.train()
    return total / targets


def _identity(job: Job) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it.

    Budgets may: placement is invisible to the numbers. So may the number of steps, which
    stretches the rest of the learning-rate curve.
    """
    config = job.config
    kept = {"model": config.model, "schedule.warmup": config.schedule.warmup}
    for name in ("data", "optimizer", "compute"):
        kept |= {f"{name}.{key}": value for key, value in asdict(getattr(config, name)).items()}
    del kept["data.path"]  # files may move; their content may not change
    del kept["optimizer.step_in_backward"]  # same bits
    return kept | {"data content": job.train.fingerprint()}


def _save(session: _Session) -> int:
    rundir = session.job.rundir
    extra = {
        "step": session.step,
        "position": asdict(session.sampler.position),
        "identity": _identity(session.job),
    }
    rundir.checkpoint(session.step).parent.mkdir(exist_ok=True)
    session.runtime.save(rundir.checkpoint(session.step), session.scheduler, extra)
    rundir.forget_old_checkpoints()
    return session.step


def _restore(session: _Session, observer: Observer) -> None:
    """Load the newest checkpoint that is whole; older ones only if it is damaged."""
    damaged: list[CheckpointError] = []
    for path in session.job.rundir.checkpoints():
        try:
            extra = session.runtime.load(path, session.scheduler)
        except CheckpointError as error:
            damaged.append(error)
            observer.warn(f"skipped checkpoint {path.name}: {error}")
            continue
        _check_identity(path, extra["identity"], _identity(session.job))
        session.step = int(extra["step"])
        session.sampler.position = Position(**extra["position"])
        observer.note(f"resumed after step {session.step} from {path}")
        return
    if damaged:
        raise CheckpointError(
            f"no checkpoint in {session.job.rundir.root} can be read ({damaged[0]}); "
            "start again with another --output"
        ) from damaged[0]
    observer.note(f"no checkpoint in {session.job.rundir.root} yet: starting at step 1")


def _check_identity(path: Path, made_with: dict[str, Any], now: dict[str, Any]) -> None:
    if found := changed(made_with, now):
        raise InputError(
            f"checkpoint {path.name} was made with {found}; resume with the same "
            "values, or start a new --output"
        )


def _finish(session: _Session, outcome: Outcome, observer: Observer) -> Outcome:
    """Export the trained model with its tokenizer as one directory, whole or not at all."""
    target = session.job.rundir.model
    with replacing(target) as fresh:
        session.runtime.export(fresh)
        session.job.tokenizer.save_pretrained(fresh)
    observer.note(f"model written to {target}")
    return Outcome(outcome.step, outcome.loss, outcome.eval_loss, target)
