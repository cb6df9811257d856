"""``offload plan``: how a task would be run within these budgets, and how fast, before it is.

Fine-tuning is in offload/plan_finetune.py; generation is searched for and printed here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer import Option

from offload import options
from offload.command import quiet_transformers, voice
from offload.errors import BudgetError, OffloadError
from offload.heap import FREE_KEPT_BYTES, kept_bytes_for
from offload.machines import DTYPES, rates_of, read_machine, site_of
from offload.prefetch.generation import Policy, Rates, Shape, Weights, Workload
from offload.prefetch.rehearse import rehearse
from offload.prefetch.search import NothingFits, Problem, search
from offload.tiers.layout import choose_chunk_bytes
from offload.tiers.spec import Budget, Compute, Machine, format_size, parse_size

if TYPE_CHECKING:
    from offload.plan_finetune import Means


class Found(NamedTuple):
    """What the search chose, of what, for which rates."""

    policy: Policy
    shape: Shape
    rates: Rates


def plan(
    context: typer.Context,
    model: Annotated[str, Option(help="Directory, config.json or hub name; no weights are read.")],
    host_memory: Annotated[
        str | None, Option(help="RAM budget, e.g. 24GiB; without: the machine's.")
    ] = None,
    task: Annotated[str, Option(help="finetune or generate.")] = "generate",
    device_memory: Annotated[
        str | None, Option(help="GPU budget, e.g. 20GiB, for a machine that has one.")
    ] = None,
    disk: Annotated[str, Option(help="Directory on the disk that would be used.")] = ".",
    disk_memory: Annotated[str | None, Option(help="Disk budget, e.g. 200GiB.")] = None,
    machine: Annotated[
        str | None,
        Option(help="One of the table (docs/plan.md) or a JSON file; without: this one, measured."),
    ] = None,
    method: Annotated[str, Option(help="Fine-tuning: full or lora.")] = "full",
    rank: Annotated[int, Option(help="Of LoRA's adapters, at all linear layers.")] = 16,
    batch_size: Annotated[int, Option(help="Sequences per step.")] = 1,
    seq_len: Annotated[int, Option(help="Tokens per sequence.")] = 512,
    dtype: Annotated[str, Option(help="Trained with weights in float32 or bfloat16.")] = "float32",
    compute_dtype: Annotated[
        str | None, Option(help="What a GPU computes in; without: --dtype.")
    ] = None,
    state_dtype: Annotated[str | None, Option(help="Optimizer state in bf16 or int8.")] = None,
    step_in_backward: Annotated[
        bool, Option("--step-in-backward", help="Update during the backward pass.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Run layers again in the backward pass.")
    ] = False,
    advice: Annotated[
        bool, Option("--advice/--no-advice", help="Say which changes would help.")
    ] = True,
    prompts: Annotated[
        int, Option("--prompt-count", help="Generation: how many prompts there are.")
    ] = 1,
    prompt_tokens: Annotated[int, Option(help="Tokens of each.")] = 64,
    new_tokens: Annotated[int, Option("--max-new-tokens", help="Tokens to add to each.")] = 64,
    weight_dtype: Annotated[
        str | None, Option(help="int4, int8 or a floating type; without: the model's own.")
    ] = None,
    kv_tiers: Annotated[
        bool, Option("--kv-tiers", help="Keys and values may go to disk (runtime.kv_cache).")
    ] = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Say what a task would need and take on a machine, before anything is allocated.

    Exit status: 0 it fits, 3 it does not fit (both with the forecast), 2 it cannot be told.
    """
    from offload.blueprint import FineTune
    from offload.plan_finetune import DOES_NOT_FIT, Means, forecast, show, to_json
    from offload.shape import read_config

    voice(context, as_json=as_json, verbose=verbose, quiet=quiet)
    quiet_transformers()
    if task not in ("finetune", "generate"):
        raise OffloadError(f"plan: no task {task!r}; there are finetune and generate")
    config = read_config(model)
    means = Means(machine, host_memory, device_memory, disk, disk_memory)
    if task == "generate":
        work = Workload(prompts, prompt_tokens, new_tokens)
        found = _generate(config, work, weight_dtype, means, kv_tiers=kv_tiers)
        if as_json:
            typer.echo(json.dumps(as_dict(found, work)))
        elif not quiet:
            _show(found.policy, found.shape, work)
        return
    job = FineTune(
        method, rank, dtype, compute_dtype, weight_dtype, state_dtype, batch_size, seq_len,
        gradient_checkpointing, step_in_backward,
    )  # fmt: skip
    report = forecast(config, job, means, advice=advice)
    if as_json:
        typer.echo(to_json(report))
    elif not quiet:
        show(report)
    if not report.answer.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _generate(
    config: Any, work: Workload, weight_dtype: str | None, means: Means, *, kv_tiers: bool
) -> Found:
    """Choose rows at once and placement."""
    from offload.shape import read_shape, weight_type

    if means.host_memory is None:
        raise OffloadError("plan: --task generate needs --host-memory, e.g. 24GiB")
    disk_bytes = parse_size(means.disk_memory) if means.disk_memory else None
    budget = Budget(parse_size(means.host_memory), disk_bytes=disk_bytes)
    shape = read_shape(config, weight_dtype)
    if means.machine is None:
        rates = measured(config, weight_dtype, means.disk)
    else:
        rates = read_rates(means.machine, weight_type(config, None), shape.weights)
    if rates.device is not None:
        device = means.device_memory
        if device is None:
            raise OffloadError(f"plan: {means.machine} has a GPU: give --device-memory, e.g. 20GiB")
        budget = replace(budget, device_bytes=parse_size(device))
    return Found(choose(Problem(shape, rates, budget, work, kv_tiers)), shape, rates)


def choose(problem: Problem) -> Policy:
    """The search, with what malloc is allowed to keep taken off. Raises BudgetError."""
    given_bytes = problem.budget.host_bytes
    kept_bytes = kept_bytes_for(given_bytes) - FREE_KEPT_BYTES
    budget = replace(problem.budget, host_bytes=given_bytes - kept_bytes)
    chunk_bytes = choose_chunk_bytes(given_bytes // 2, 2)
    problem = replace(problem, budget=budget)
    try:
        return rehearse(problem, search(problem), chunk_bytes)
    except NothingFits as error:
        needed_bytes = error.smallest_bytes + kept_bytes
        raise BudgetError(
            f"plan: {error}; a larger --host-memory (at least {format_size(needed_bytes)}) or "
            "--disk-memory, fewer tokens, or --weight-dtype int4 would help",
            tier="host", needed_bytes=needed_bytes, given_bytes=given_bytes,
            smallest_bytes=needed_bytes,
        ) from None  # fmt: skip


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
