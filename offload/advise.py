"""Variants of a fine-tuning job that might help, each forecast like the job itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from offload.blueprint import FineTune
from offload.errors import OffloadError
from offload.forecast import Answer, Forecaster
from offload.machines import Site
from offload.prefetch.advice import Change, Cost, Outcome, rank
from offload.tiers.spec import GIB, Budget, format_size, round_up


def advise(
    forecaster: Forecaster, job: FineTune, site: Site, budget: Budget, now: Answer
) -> list[Change]:
    """What would help most for least; see `offload.prefetch.advice.rank`."""
    found = []
    for what, cost, other, room in _variants(job, budget, now):
        with contextlib.suppress(OffloadError):  # a variant that cannot be had is no advice
            then = forecaster.answer(other, site, room)
            found.append(Change(what, cost, outcome(then, other)))
    return rank(outcome(now, job), found)


def outcome(answer: Answer, job: FineTune) -> Outcome:
    """The forecast in short."""
    pace = answer.pace
    if pace is None:
        return Outcome(False, 0.0, 0.0)
    return Outcome(True, pace.tokens_per_s, pace.write_bytes / job.tokens)


def _variants(
    job: FineTune, budget: Budget, now: Answer
) -> Iterator[tuple[str, Cost, FineTune, Budget]]:
    if not job.in_backward:
        yield ("update in the backward pass (--step-in-backward)", Cost.NONE,
               replace(job, in_backward=True), budget)  # fmt: skip
    if not job.recompute:
        yield ("run layers again in the backward pass (--gradient-checkpointing)", Cost.NONE,
               replace(job, recompute=True), budget)  # fmt: skip
    for state in ("bf16", "int8"):
        if job.state_dtype is None or (job.state_dtype, state) == ("bf16", "int8"):
            yield (f"optimizer state in {state} (--state-dtype {state})", Cost.NUMBERS,
                   replace(job, state_dtype=state), budget)  # fmt: skip
    if job.method == "lora" and job.weight_dtype is None:
        yield ("frozen weights in 4 bits (--weight-dtype int4)", Cost.NUMBERS,
               replace(job, weight_dtype="int4"), budget)  # fmt: skip
    if job.batch > 1:
        half = job.batch // 2
        yield (f"batch {half} (--batch-size {half})", Cost.NUMBERS,
               replace(job, batch=half), budget)  # fmt: skip
    twice = 2 * job.batch
    yield (f"batch {twice} (--batch-size {twice})", Cost.NUMBERS,
           replace(job, batch=twice), budget)  # fmt: skip
    host = _more_memory(budget, now)
    yield (f"{format_size(host)} of host memory (--host-memory)", Cost.HARDWARE, job,
           replace(budget, host_bytes=host))  # fmt: skip


def _more_memory(budget: Budget, now: Answer) -> int:
    """What the job needs, a little rounded; or twice as much as there is."""
    needed = now.tiers["host"].needed_bytes
    if needed > budget.host_bytes:
        return round_up(int(1.02 * needed), GIB // 64 if needed < GIB else GIB)
    return 2 * budget.host_bytes
