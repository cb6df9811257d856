"""``offload plan``: how a task would be run within these budgets, and how fast, before it is.

Fine-tuning is in offload/plan_finetune.py; generation is searched for and printed here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import typer

from offload import options
from offload.command import (
    Voice,
    epilog,
    file_values,
    flags_given,
    quiet_transformers,
    show_plan,
    voice,
)
from offload.errors import BudgetError, OffloadError
from offload.generateconfig import GenerateConfig
from offload.heap import FREE_KEPT_BYTES, kept_bytes_for
from offload.machines import DTYPES, rates_of, read_machine, site_of
from offload.planconfig import PlanConfig, build_plan
from offload.prefetch.generation import Policy, Rates, Shape, Weights, Workload
from offload.prefetch.rehearse import rehearse
from offload.prefetch.room import floor_bytes
from offload.prefetch.search import NothingFits, Problem, search, smallest_bytes
from offload.runconfig import RunConfig
from offload.settings import flags_of
from offload.tiers.layout import choose_chunk_bytes
from offload.tiers.spec import (
    KIB,
    MIB,
    Budget,
    Compute,
    Machine,
    format_size,
    parse_size,
    round_up,
)

FLAGS = flags_of(PlanConfig)
EPILOG = epilog(
    "offload plan --task finetune --model DIR --machine rtx4090-64gb-gen4 --batch-size 4",
    "offload plan --model DIR --host-memory 24GiB --disk /scratch --prompt-count 32",
    "offload plan --config runs/mine/config.yaml --host-memory 12GiB",
)


class Found(NamedTuple):
    """What the search chose, of what, for which rates."""

    policy: Policy
    shape: Shape
    rates: Rates


def plan(
    context: typer.Context,
    config: options.Config = None,
    model: options.PlannedModel = None,
    task: options.Task = None,
    machine: options.MachineName = None,
    dry_run: options.DryRun = False,
    device_memory: options.PlannedDevice = None,
    host_memory: options.PlannedHost = None,
    disk: options.PlannedDisk = None,
    disk_memory: options.PlannedDiskMemory = None,
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = None,
    accumulate: options.Accumulate = None,
    prompt_count: options.PromptCount = None,
    prompt_tokens: options.PromptTokens = None,
    max_new_tokens: options.MaxNewTokens = None,
    kv_tiers: options.KvTiers = None,
    method: options.Method = None,
    rank: options.Rank = None,
    dtype: options.PlannedDtype = None,
    compute_dtype: options.ComputeDtype = None,
    weight_dtype: options.WeightDtype = None,
    state_dtype: options.StateDtype = None,
    step_in_backward: options.StepInBackward = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    advice: options.Advice = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what a task would need and take on a machine, before anything is allocated.

    A --config file of finetune or generate will do. Exit status: 0 it fits, 3 it does not fit (both
    with the forecast), 2 it cannot be told.
    """
    # The settings among the parameters above are read from the context, by their names.
    told = voice(context, as_json=as_json, verbose=verbose, quiet=quiet)
    values = file_values(config, PlanConfig, RunConfig, GenerateConfig)
    made, left_out = build_plan(values | flags_given(context, FLAGS))
    quiet_transformers()
    for key in left_out:
        told.note(f"{key} is not modelled: the forecast is of the same without it")
    if dry_run:
        _dry_run(made, told)
    elif made.task == "generate":
        _plan_rows(made, told)
    else:
        _plan_steps(made, told)


def _dry_run(config: PlanConfig, told: Voice) -> None:
    """Everything but the forecast, and nothing is measured."""
    from offload.shape import read_config, weight_type

    read_config(config.model)
    if config.task == "generate":
        weight_type(None, config.compute.weight_dtype or config.compute.dtype)
    else:
        config.job  # noqa: B018, it is checked as it is made
    place = config.machine
    if place is not None:
        read_machine(place)
        line = f"would forecast it for {place}, from figures: nothing is measured"
    else:
        disk = config.memory.disk or "."
        line = f"would measure this machine and {disk}, where no earlier measurement is kept"
    show_plan(told, config, {"measures": place is None}, [line])


def _plan_rows(config: PlanConfig, told: Voice) -> None:
    from offload.shape import read_config

    found = _generate(read_config(config.model), config)
    if told.as_json:
        typer.echo(json.dumps(as_dict(found, config.work)))
    elif not told.quiet:
        _show(found.policy, found.shape, config.work)


def _plan_steps(config: PlanConfig, told: Voice) -> None:
    from offload.plan_finetune import DOES_NOT_FIT, Means, forecast, show, to_json
    from offload.shape import read_config

    memory = config.memory
    means = Means(
        config.machine, memory.host_memory, memory.device_memory, memory.disk or ".",
        memory.disk_memory,
    )  # fmt: skip
    report = forecast(read_config(config.model), config.job, means, advice=config.advice)
    if told.as_json:
        typer.echo(to_json(report))
    elif not told.quiet:
        show(report)
    if not report.answer.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _generate(model: Any, config: PlanConfig) -> Found:
    """Choose rows at once and placement, for the configuration of a model."""
    from offload.shape import read_shape, stored_as, weight_type

    memory, machine = config.memory, config.machine
    weight_dtype = config.compute.weight_dtype
    model = stored_as(model, config.compute.dtype)  # codes are widened to it
    if memory.host_memory is None:
        raise OffloadError("plan: --task generate needs --host-memory, e.g. 24GiB")
    disk_bytes = parse_size(memory.disk_memory) if memory.disk_memory else None
    budget = Budget(parse_size(memory.host_memory), disk_bytes=disk_bytes)
    shape = read_shape(model, weight_dtype)
    if machine is None:
        rates = measured(model, weight_dtype, memory.disk or ".")
    else:
        rates = read_rates(machine, weight_type(model, None), shape.weights)
    if rates.device is not None:
        if memory.device_memory is None:
            raise OffloadError(f"plan: {machine} has a GPU: give --device-memory, e.g. 20GiB")
        budget = replace(budget, device_bytes=parse_size(memory.device_memory))
    problem = Problem(shape, rates, budget, config.work, config.rows.kv_tiers)
    return Found(choose(problem), shape, rates)


def choose(problem: Problem) -> Policy:
    """The search, in what a run has of the budget. Raises BudgetError."""
    given_bytes = problem.budget.host_bytes
    within = _within(problem, given_bytes)
    try:
        if given_bytes < _floor_bytes(within):
            raise NothingFits(_floor_bytes(within), problem.budget)
        return rehearse(within, search(within))
    except NothingFits as error:
        needed_bytes = least_budget_bytes(problem)
        raise BudgetError(
            f"plan: {error}; a larger --host-memory (at least {format_size(needed_bytes)}, "
            f"{needed_bytes} bytes) or --disk-memory, fewer tokens, or --weight-dtype int4 would "
            "help",
            tier="host", needed_bytes=needed_bytes, given_bytes=given_bytes,
            smallest_bytes=needed_bytes,
        ) from None  # fmt: skip


def least_budget_bytes(problem: Problem) -> int:
    """The least host memory above the problem's own in which it can be planned, and run.

    Chunks and what malloc may keep grow with the budget, so it is looked for from below.
    """
    budget_bytes = problem.budget.host_bytes
    while True:
        within = _within(problem, budget_bytes)
        taken_bytes = budget_bytes - within.budget.host_bytes
        needed_bytes = max(smallest_bytes(within) + taken_bytes + 1, _floor_bytes(within))
        if needed_bytes <= budget_bytes:
            return budget_bytes
        budget_bytes = round_up(needed_bytes, MIB if within.chunk_bytes > MIB else KIB)


def _within(problem: Problem, budget_bytes: int) -> Problem:
    """What a run with this budget has for its weights and rows, and in which chunks."""
    taken_bytes = kept_bytes_for(budget_bytes) - FREE_KEPT_BYTES + problem.shape.weights.fixed_bytes
    budget = replace(problem.budget, host_bytes=budget_bytes - taken_bytes)
    return replace(problem, budget=budget, chunk_bytes=choose_chunk_bytes(budget_bytes // 2, 2))


def _floor_bytes(problem: Problem) -> int:
    return floor_bytes(problem.shape.weights.largest_bytes, problem.chunk_bytes, 2)


def measured(config: Any, weight_dtype: str | None, disk: str) -> Rates:
    """Rates of this machine, measured now where no earlier measurement is kept."""
    from offload.calibrate import cached_calibration
    from offload.tiers.probe import cached_probe

    folder = Path(disk).expanduser()
    machine = cached_probe(folder)
    return Rates(machine, cached_calibration(config, weight_dtype, folder, machine))


def read_rates(name: str, dtype: str, weights: Weights) -> Rates:
    """Of a machine of the table, or of a file: its fields, or ``{"machine": ..., "host": ...}`` as
    ``--json`` prints them under rates. Raises OffloadError.
    """
    found = read_machine(name)
    found = found.get("rates", found)
    if "host_memory" in found:
        dtype = dtype if dtype in DTYPES else "bfloat16"
        rates = rates_of(site_of(name, found, dtype), 4 if dtype == "float32" else 2)
        device = weights.routed(rates.device) if rates.device is not None else None
        return replace(rates, host=weights.routed(rates.host), device=device)
    try:
        return Rates(Machine(**found["machine"]), Compute.from_dict(found["host"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OffloadError(
            f'plan: no rates in {name} ({error!r}); it should have {{"machine": ..., "host": ...}} '
            "as offload plan --json prints them under rates, or the fields of docs/plan.md"
        ) from error


def as_dict(found: Found, work: Workload) -> dict[str, Any]:
    """What ``--json`` prints: everything that was chosen, predicted and used. Units in names."""
    policy, shape, rates = found.policy, found.shape, found.rates
    return {
        "task": "generate",
        "work": asdict(work),
        "policy": asdict(policy),
        "decode_tokens_per_s": policy.rows / policy.times.pass_s,
        "shape": asdict(shape),
        "experts": experts_of(policy, shape),
        "rates": {"machine": rates.machine.to_dict(), "host": rates.host.to_dict()},
    }


def experts_of(policy: Policy, shape: Shape) -> dict[str, Any] | None:
    """What is assumed of experts, and what follows; None: the model has none."""
    experts, layers = shape.weights.experts, shape.weights.layers
    if not experts.layer_bytes:
        return None
    touched, read_bytes = experts.touched(policy.rows), experts.layer_bytes * layers
    return {
        "touched_share": touched,
        "touched_bytes_per_token": touched * read_bytes / policy.rows,
        "pass_bytes_per_token": shape.weights.pass_bytes / policy.rows,
        "assumption": (
            f"experts: {experts.chosen} of {experts.count} for each token. If routing is balanced "
            f"and independent, {policy.rows} rows touch 1 - (1 - {experts.chosen}/{experts.count})"
            f"^{policy.rows} = {touched:.0%} of them in a pass: products are counted for those "
            f"({format_size(touched * read_bytes)} of {format_size(read_bytes)}). Experts stand "
            "stacked in one tensor, so a pass needs all of them, and reads all that is on disk"
        ),
    }


def attention_of(policy: Policy) -> str:
    """Where attention to keys and values outside the device is computed, and how to ask for it."""
    if policy.cpu_attention:
        return "attention to keys and values outside the device: on the host (--attention host)"
    return "keys and values outside the device are copied there (--attention device)"


def _show(policy: Policy, shape: Shape, work: Workload) -> None:
    from rich.console import Console
    from rich.table import Table

    held_rows = policy.rows * (work.prompt_tokens + work.new_tokens) * shape.rows.position_bytes
    tiers = [t for t in ("device", "host", "disk") if t != "device" or policy.held_bytes[t]]
    table = Table("", *tiers)
    for name, shares, total_bytes in (
        ("weights of a pass", policy.weights, shape.weights.pass_bytes),
        ("keys and values", policy.kv, held_rows),
    ):
        table.add_row(name, *(format_size(getattr(shares, t) * total_bytes) for t in tiers))
    table.add_row("held at most", *(format_size(policy.held_bytes[t]) for t in tiers))
    console, times = Console(), policy.times
    console.print(
        f"it fits: {policy.rows} rows at once, {policy.micro_batches} micro-batches of "
        f"{policy.batch}; weights {format_size(shape.weights.total_bytes)}"
    )
    console.print(table)
    if policy.kv.device < 1 and "device" in tiers:
        console.print(attention_of(policy))
    experts = experts_of(policy, shape)
    if experts is not None:
        console.print(experts["assumption"])
    console.print(
        f"predicted: {policy.tokens_per_s:.2f} tokens/s in all "
        f"({policy.rows / times.pass_s:.2f} after the prompts), {times.total_s:.1f} s"
    )
    console.print(
        f"bound: {work.prompts * work.new_tokens / times.bound_s:.2f} tokens/s; "
        f"what binds: {times.binding}. A pass takes {times.pass_s:.3f} s, prompts "
        f"{times.prefill_s:.3f} s, the first ones, whose pass is recorded, {times.first_s:.3f} s."
    )
