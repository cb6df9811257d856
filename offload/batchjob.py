"""``offload generate``: a file of prompts to a file of rows, that can be killed and run again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from offload.api import from_pretrained
from offload.block import Block, BlockStep, Row
from offload.blockcaches import KVAsked
from offload.blockroom import longest_prompt
from offload.config import Tuning
from offload.generateconfig import GenerateConfig
from offload.handle import runtime
from offload.interrupt import Interrupt
from offload.modelclass import auto_class
from offload.places import BlockPlan
from offload.preflight import check_spill_directory, load_tokenizer, read_model_config
from offload.progress import Observer, View
from offload.prompts import PromptLine, encode, fingerprint, read_prompts
from offload.remaining import RowsLeft
from offload.rows import RowFile
from offload.runconfig import TINY_MODEL
from offload.runreport import RowsReport
from offload.sampling import Sampling
from offload.settings import InputError
from offload.throughput import Asked, make_block

_RECENT_STEPS = 20


@dataclass(frozen=True, slots=True)
class Generated:
    """How a run ended. ``stopped_by``: the signal that asked it to stop, or None."""

    rows: int
    done_before: int
    total: int
    stopped_by: int | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A checked run: the tokens of each prompt, by its number."""

    config: GenerateConfig
    asked: Asked
    lines: Sequence[PromptLine]
    ids: Sequence[Sequence[int]]
    tokenizer: Any
    model_class: Any


def generate(
    config: GenerateConfig, *, observer: Observer, tuning: Tuning | None = None
) -> Generated:
    """Write a row for each prompt that has none yet, as they end. ``tuning``: for tests.

    Raises OffloadError for what cannot work; bad input is found before the model is loaded. After
    the first Ctrl-C the step that runs is finished.
    """
    job = prepare(config)
    path = Path(config.output).expanduser()
    with RowFile(path, _identity(job), [line.id for line in job.lines]) as file:
        left = {n: job.ids[n] for n, line in enumerate(job.lines) if line.id not in file.done}
        before = len(job.lines) - len(left)
        observer.note(describe(job, before))
        if not left:
            return Generated(0, before, len(job.lines))
        dtype = getattr(torch, config.compute.dtype) if config.compute.dtype else None
        model = from_pretrained(
            config.model, model_class=job.model_class, dtype=dtype, tuning=tuning,
            **asdict(config.memory),
        )  # fmt: skip
        with runtime(model) as run:
            block = make_block(run, left, job.asked, job.tokenizer)
            observer.note(str(run.rows))
            progress = _Progress(observer, before, len(job.lines), _rows_left(left, job.asked))
            try:
                return _run(job, block, file, progress, RowsReport(run, path, observer))
            finally:
                observer.close()


def prepare(config: GenerateConfig, *, dry: bool = False) -> Job:
    """Everything that can be refused is refused here; ``dry``: nothing is written, no folder made.

    Raises OffloadError and ValueError.
    """
    asked = _asked(config)
    if config.model == TINY_MODEL:
        raise InputError(
            f"{TINY_MODEL} has random weights until it is trained: give the model directory that "
            "'offload finetune' has written"
        )
    lines = read_prompts(Path(config.data.prompts).expanduser())
    model_config = read_model_config(config.model)
    check_spill_directory(config.memory, dry=dry)
    tokenizer = load_tokenizer(config.model)
    ids = encode(lines, tokenizer, longest_prompt(model_config))
    return Job(config, asked, lines, ids, tokenizer, auto_class(model_config))


def done_before(job: Job) -> int:
    """How many rows a real run would find done; nothing is written. Raises InputError."""
    path = Path(job.config.output).expanduser()
    return len(RowFile.look(path, _identity(job), [line.id for line in job.lines]))


def _asked(config: GenerateConfig) -> Asked:
    told, data = config.sampling, config.data
    plan = None
    if data.batch_size is not None:
        plan = BlockPlan(data.batch_size, data.micro_batches or 1)
    sampling = Sampling(told.temperature, told.top_k, told.top_p, config.compute.seed)
    kv = KVAsked(config.cache.kv_memory, config.cache.kv_dtype, config.cache.attention)
    return Asked(told.max_new_tokens, sampling, told.stop, plan, kv)


def _rows_left(left: Mapping[int, Sequence[int]], asked: Asked) -> RowsLeft:
    return RowsLeft(len(left), sum(map(len, left.values())), asked.max_new_tokens)


def _identity(job: Job) -> dict[str, Any]:
    """What decides the rows' tokens; budgets and the size of the block do not."""
    config, asked = job.config, job.asked
    return {
        "model": config.model, "dtype": config.compute.dtype, "prompts": fingerprint(job.lines),
        "max_new_tokens": asked.max_new_tokens, "stop": list(asked.stop),
        "kv_dtype": asked.kv.kv_dtype, "with_prompt": config.data.with_prompt,
        **asdict(asked.sampling),
    }  # fmt: skip


def describe(job: Job, before: int) -> str:
    """The run in one line."""
    tokens = sum(map(len, job.ids))
    there = f", {before:,} of them done before" if before else ""
    return f"{job.config.model}: {len(job.ids):,} prompts of {tokens:,} tokens{there}"


def _run(
    job: Job, block: Block, file: RowFile, progress: _Progress, report: RowsReport
) -> Generated:
    written = 0
    with Interrupt() as interrupt:
        progress.begin()
        steps = block.steps()
        try:
            for step in steps:
                file.append(_output(job, row) for row in step.finished)
                written += len(step.finished)
                progress.step(step)
                report.step(step)
                if interrupt.signal is not None:
                    break
            report.finish()
        finally:
            steps.close()
    total = len(job.lines)
    before = progress.before
    stopped = interrupt.signal if before + written < total else None
    return Generated(written, before, total, stopped)


def _output(job: Job, row: Row) -> Mapping[str, Any]:
    line = job.lines[row.index]
    shown: dict[str, Any] = {"id": line.id}
    if job.config.data.with_prompt:
        shown |= {"messages": line.messages} if line.messages else {"prompt": line.prompt}
    return shown | {"text": row.text, "tokens": len(row.tokens), "finish_reason": row.reason}


class _Progress:
    """Tokens a second against the bound, and the time left."""

    def __init__(self, observer: Observer, before: int, total: int, left: RowsLeft) -> None:
        self.before = before
        self._observer = observer
        self._done = before
        self._total = total
        self._left = left
        self._recent: deque[BlockStep] = deque(maxlen=_RECENT_STEPS)
        self._step = 0

    def begin(self) -> None:
        """The first step is about to begin."""
        self._observer.begin(self.before, self._total)

    def step(self, step: BlockStep) -> None:
        """A step is over."""
        self._step += 1
        self._recent.append(step)
        self._done += len(step.finished)
        self._observer.show(self._view(step))

    def _view(self, step: BlockStep) -> View:
        tokens_per_s = sum(s.new_tokens for s in self._recent) / sum(s.step_s for s in self._recent)
        bound = step.new_tokens / step.bound_s if step.bound_s else None
        ended = [len(row.tokens) for row in step.finished]
        left = self._left.after(step.step_s, step.new_tokens, step.prompt_tokens, ended)
        speed = f"{tokens_per_s:,.1f} tokens/s"
        if bound:
            speed += f" (bound {bound:,.1f})"
        rows = f"{self._done}/{self._total} rows"
        line = f"step {self._step}  {rows}  {step.new_tokens} at once  {speed}"
        return View(
            rows, self._done, self._total, left,
            (("speed", speed), ("at once", f"{step.new_tokens} rows in {step.micro_batches}")),
            f"{line}  left {left}",
            {
                "step": self._step, "rows": self._done, "total": self._total,
                "new_tokens": step.new_tokens, "prompt_tokens": step.prompt_tokens,
                "step_s": step.step_s, "bound_s": step.bound_s,
                "tokens_per_s": round(tokens_per_s, 2),
                "bound_tokens_per_s": round(bound, 2) if bound else None,
                "left_s": round(left.seconds, 1),
            },
        )  # fmt: skip
