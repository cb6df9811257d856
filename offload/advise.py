"""Variants of a fine-tuning job that might help, each forecast like the job itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

from offload.blueprint import FineTune
from offload.coding import coding_s_per_byte
from offload.errors import OffloadError
from offload.forecast import Answer, Forecaster
from offload.machines import Site
from offload.prefetch.advice import Change, Cost, Outcome, rank
from offload.tiers.spec import GIB, Budget, format_size, round_up


def advise(
    forecaster: Forecaster, job: FineTune, site: Site, budget: Budget, now: Answer,
    site_for: Callable[[FineTune], Site] | None = None,
) -> list[Change]:  # fmt: skip
    """What would help most for least; see `offload.prefetch.advice.rank`.

    ``site_for``: this machine, measured with a job that updates in another way: what the small run
    of the job itself took says nothing of that. None: figures of a machine, without measurements.
    """
    found = []
    for what, cost, other, room in variants(job, budget, now):
        with contextlib.suppress(OffloadError):  # a variant that cannot be had is no advice
            there = site_of_variant(site, job, other, site_for) if site_for else site
            then = forecaster.answer(other, there, room)
            found.append(Change(what, cost, outcome(then, other)))
    return rank(outcome(now, job), found)


def site_of_variant(
    site: Site, job: FineTune, other: FineTune, site_for: Callable[[FineTune], Site]
) -> Site:
    """``site``, measured with ``job``, for another one. Coding of state is timed by itself: a small
    run has memory to spare, in which it takes a third.
    """
    if (job.in_backward, job.state_dtype) == (other.in_backward, other.state_dtype):
        return site
    if job.state_dtype is None and other.state_dtype is not None:
        return replace(site, coding_s_per_byte=coding_s_per_byte(other.state_dtype))
    return site_for(other)


def outcome(answer: Answer, job: FineTune) -> Outcome:
    """The forecast in short."""
    pace = answer.pace
    if pace is None:
        return Outcome(False, 0.0, 0.0)
    return Outcome(True, pace.tokens_per_s, pace.write_bytes / job.tokens)


def variants(
    job: FineTune, budget: Budget, now: Answer
) -> Iterator[tuple[str, Cost, FineTune, Budget]]:
    """What is tried: in words, what it costs, and the job and the budget as they would be."""
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
    host = _more_memory(budget.host_bytes, now.tiers["host"].needed_bytes)
    yield (f"{format_size(host)} of host memory (--host-memory)", Cost.HARDWARE, job,
           replace(budget, host_bytes=host))  # fmt: skip
    if budget.device_bytes is not None:
        device = _more_memory(budget.device_bytes, now.tiers["device"].needed_bytes)
        yield (f"{format_size(device)} of device memory (--device-memory)", Cost.HARDWARE, job,
               replace(budget, device_bytes=device))  # fmt: skip


def _more_memory(given: int, needed: int) -> int:
    """What the job needs, a little rounded; or twice as much as there is."""
    if needed > given:
        return round_up(int(1.02 * needed), GIB // 64 if needed < GIB else GIB)
    return 2 * given
