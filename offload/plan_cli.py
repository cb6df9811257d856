"""``offload plan``: how a task would be run within these budgets, and how fast, before it is."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from offload.errors import BudgetError, OffloadError
from offload.heap import FREE_KEPT_BYTES, kept_bytes_for
from offload.prefetch.generation import Policy, Rates, Shape, Workload
from offload.prefetch.rehearse import rehearse
from offload.prefetch.search import NothingFits, Problem, search
from offload.tiers.layout import choose_chunk_bytes
from offload.tiers.spec import Budget, Compute, Machine, format_size, parse_size


def plan(
    model: Annotated[str, Option(help="Directory, config.json or hub name; no weights are read.")],
    host_memory: Annotated[str, Option(help="RAM budget, e.g. 24GiB.")],
    task: Annotated[str, Option(help="generate")] = "generate",
    disk: Annotated[str, Option(help="Directory on the disk that would be used.")] = ".",
    disk_memory: Annotated[str | None, Option(help="Disk budget, e.g. 200GiB.")] = None,
    prompts: Annotated[int, Option("--prompt-count", help="How many prompts there are.")] = 1,
    prompt_tokens: Annotated[int, Option(help="Tokens of each.")] = 64,
    new_tokens: Annotated[int, Option("--max-new-tokens", help="Tokens to add to each.")] = 64,
    weight_dtype: Annotated[
        str | None, Option(help="int4, int8 or a floating type; without: the model's own.")
    ] = None,
    kv_tiers: Annotated[
        bool, Option("--kv-tiers", help="Keys and values may go to disk (runtime.kv_cache).")
    ] = False,
    machine: Annotated[
        str | None, Option(help="Rates from this file, as --json prints them, not measured.")
    ] = None,
    as_json: Annotated[bool, Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Choose rows at once and placement from measured rates, and print what they should give."""
    if task != "generate":
        raise OffloadError(
            f"plan: --task {task} is not there yet; --task generate is"
            if task == "finetune" else f"plan: no task {task!r}; there is generate"
        )  # fmt: skip
    from offload.shape import read_config, read_shape

    config = read_config(model)
    work = Workload(prompts, prompt_tokens, new_tokens)
    budget = Budget(parse_size(host_memory), disk_bytes=parse_size(disk_memory) if disk_memory
                    else None)  # fmt: skip
    rates = read_rates(machine) if machine else measured(config, weight_dtype, disk)
    shape = read_shape(config, weight_dtype)
    policy = choose(Problem(shape, rates, budget, work, kv_tiers))
    if as_json:
        typer.echo(json.dumps(as_dict(policy, shape, rates, work)))
        return
    _show(policy, shape, work)


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


def read_rates(file: str) -> Rates:
    """``{"machine": ..., "host": ...}``, as in what ``--json`` prints. Raises OffloadError."""
    try:
        found = json.loads(Path(file).expanduser().read_text())
        found = found.get("rates", found)
        return Rates(Machine(**found["machine"]), Compute.from_dict(found["host"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OffloadError(
            f'plan: no rates in {file} ({error!r}); it should have {{"machine": ..., "host": ...}} '
            "as offload plan --json prints them under rates"
        ) from error


def as_dict(policy: Policy, shape: Shape, rates: Rates, work: Workload) -> dict[str, Any]:
    """What ``--json`` prints: everything that was chosen, predicted and used. Units in names."""
    return {
        "task": "generate",
        "work": asdict(work),
        "policy": asdict(policy),
        "decode_tokens_per_s": policy.rows / policy.times.pass_s,
        "shape": asdict(shape),
        "rates": {"machine": rates.machine.to_dict(), "host": rates.host.to_dict()},
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
    console.print(
        f"predicted: {policy.tokens_per_s:.2f} tokens/s in all "
        f"({policy.rows / times.pass_s:.2f} after the prompts), {times.total_s:.1f} s"
    )
    console.print(
        f"bound: {work.prompts * work.new_tokens / times.bound_s:.2f} tokens/s; "
        f"what binds: {times.binding}. A pass takes {times.pass_s:.3f} s, prompts "
        f"{times.prefill_s:.3f} s. The first passes, which are recorded, take longer."
    )
