"""``offload generate``: a file of prompts to a file of rows, that can be killed and run again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from offload.api import from_pretrained, runtime
from offload.block import Block, BlockStep, Row
from offload.blockroom import positions_of
from offload.config import Tuning
from offload.interrupt import Interrupt
from offload.preflight import check_spill_directory, load_tokenizer, read_model_config
from offload.progress import Observer, View, duration
from offload.prompts import PromptLine, encode, fingerprint, read_prompts
from offload.rows import RowFile
from offload.runconfig import DTYPES, TINY_MODEL, InputError, MemoryConfig
from offload.throughput import Asked, make_block

_RECENT_STEPS = 20


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """What to generate, and where it goes. ``dtype`` None: the checkpoint's own."""

    model: str
    prompts: Path
    out: Path
    asked: Asked
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    dtype: str | None = None
    with_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Generated:
    """How a run ended. ``stopped_by``: the signal that asked it to stop, or None."""

    rows: int
    done_before: int
    total: int
    stopped_by: int | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """A checked run: the tokens of each prompt, by its number."""

    config: GenerateConfig
    lines: Sequence[PromptLine]
    ids: Sequence[Sequence[int]]
    tokenizer: Any


def generate(
    config: GenerateConfig, *, observer: Observer, tuning: Tuning | None = None
) -> Generated:
    """Write a row for each prompt that has none yet, as they end. ``tuning``: for tests.

    Raises OffloadError for what cannot work; bad input is found before the model is loaded. After
    the first Ctrl-C the step that runs is finished.
    """
    job = _prepare(config)
    with RowFile(config.out, _identity(job), [line.id for line in job.lines]) as file:
        left = {n: job.ids[n] for n, line in enumerate(job.lines) if line.id not in file.done}
        before = len(job.lines) - len(left)
        observer.note(_describe(job, before))
        if not left:
            return Generated(0, before, len(job.lines))
        dtype = getattr(torch, config.dtype) if config.dtype else None
        model = from_pretrained(config.model, dtype=dtype, tuning=tuning, **asdict(config.memory))
        with runtime(model) as run:
            block = make_block(run, left, config.asked, job.tokenizer)
            observer.note(f"at most {block.plan.micro_batches} micro-batches of {block.plan.batch}")
            progress = _Progress(observer, before, len(job.lines), config.asked.max_new_tokens)
            try:
                return _run(job, block, file, progress)
            finally:
                observer.close()


def _prepare(config: GenerateConfig) -> _Job:
    """Everything that can be refused is refused here."""
    if config.dtype not in (None, *DTYPES):
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {config.dtype!r}")
    if config.model == TINY_MODEL:
        raise InputError(
            f"{TINY_MODEL} has random weights until it is trained: give the model directory that "
            "'offload finetune' has written"
        )
    lines = read_prompts(config.prompts)
    model_config = read_model_config(config.model)
    if model_config.is_encoder_decoder:
        raise InputError(
            f"{config.model} has an encoder: 'offload generate' is for decoders alone; use "
            "model.generate() on offload.from_pretrained(...)"
        )
    check_spill_directory(config.memory)
    tokenizer = load_tokenizer(config.model)
    return _Job(config, lines, encode(lines, tokenizer, positions_of(model_config)), tokenizer)


def _identity(job: _Job) -> dict[str, Any]:
    """What decides the rows' tokens; budgets and the size of the block do not."""
    config, asked = job.config, job.config.asked
    return {
        "model": config.model, "dtype": config.dtype, "prompts": fingerprint(job.lines),
        "max_new_tokens": asked.max_new_tokens, "stop": list(asked.stop),
        "kv_dtype": asked.kv.kv_dtype, "with_prompt": config.with_prompt,
        **asdict(asked.sampling),
    }  # fmt: skip


def _describe(job: _Job, before: int) -> str:
    tokens = sum(map(len, job.ids))
    there = f", {before:,} of them done before" if before else ""
    return f"{job.config.model}: {len(job.ids):,} prompts of {tokens:,} tokens{there}"


def _run(job: _Job, block: Block, file: RowFile, progress: _Progress) -> Generated:
    written = 0
    with Interrupt() as interrupt:
        progress.begin()
        steps = block.steps()
        try:
            for step in steps:
                file.append(_output(job, row) for row in step.finished)
                written += len(step.finished)
                progress.step(step)
                if interrupt.signal is not None:
                    break
        finally:
            steps.close()
    total = len(job.lines)
    before = progress.before
    stopped = interrupt.signal if before + written < total else None
    return Generated(written, before, total, stopped)


def _output(job: _Job, row: Row) -> Mapping[str, Any]:
    line = job.lines[row.index]
    shown: dict[str, Any] = {"id": line.id}
    if job.config.with_prompt:
        shown |= {"messages": line.messages} if line.messages else {"prompt": line.prompt}
    return shown | {"text": row.text, "tokens": len(row.tokens), "finish_reason": row.reason}


class _Progress:
    """Tokens a second against the bound, and the time left."""

    def __init__(self, observer: Observer, before: int, total: int, new_tokens: int) -> None:
        self.before = before
        self._observer = observer
        self._done = before
        self._total = total
        self._new_tokens = new_tokens
        self._written = 0  # tokens of the rows that have ended
        self._recent: deque[BlockStep] = deque(maxlen=_RECENT_STEPS)
        self._in_progress = 0  # tokens of the rows that have not
        self._step = 0

    def begin(self) -> None:
        """The first step is about to begin."""
        self._observer.begin(self.before, self._total)

    def step(self, step: BlockStep) -> None:
        """A step is over."""
        self._step += 1
        self._recent.append(step)
        ended = sum(len(row.tokens) for row in step.finished)
        self._done += len(step.finished)
        self._written += ended
        self._in_progress += step.new_tokens - ended
        self._observer.show(self._view(step))

    def _view(self, step: BlockStep) -> View:
        tokens_per_s = sum(s.new_tokens for s in self._recent) / sum(s.step_s for s in self._recent)
        bound = step.new_tokens / step.bound_s if step.bound_s else None
        left_s = self._left_tokens() / tokens_per_s
        speed = f"{tokens_per_s:,.1f} tokens/s"
        if bound:
            speed += f" (bound {bound:,.1f})"
        rows = f"{self._done}/{self._total} rows"
        line = f"step {self._step}  {rows}  {step.new_tokens} at once  {speed}"
        return View(
            rows, self._done, self._total, left_s,
            (("speed", speed), ("at once", f"{step.new_tokens} rows in {step.micro_batches}")),
            f"{line}  left {duration(left_s)}",
            {
                "step": self._step, "rows": self._done, "total": self._total,
                "new_tokens": step.new_tokens, "prompt_tokens": step.prompt_tokens,
                "step_s": step.step_s, "bound_s": step.bound_s,
                "tokens_per_s": round(tokens_per_s, 2),
                "bound_tokens_per_s": round(bound, 2) if bound else None,
                "left_s": round(left_s, 1),
            },
        )  # fmt: skip

    def _left_tokens(self) -> float:
        """Rows become as long as those that have ended; before one has, as long as allowed."""
        ended = self._done - self.before
        length = self._written / ended if ended else self._new_tokens
        return max(length * (self._total - self._done) - self._in_progress, 0.0)
