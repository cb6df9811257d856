"""The ``offload`` command. What is slow to import is imported inside the commands."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import typer
    from typer import Option
except ModuleNotFoundError as missing:
    raise SystemExit(
        "error: the command needs more packages: pip install 'offload[cli]'"
    ) from missing

from offload import __version__
from offload.errors import OffloadError
from offload.plan_cli import plan as plan_command
from offload.report_cli import report as report_command
from offload.runconfig import (
    InputError,
    MemoryConfig,
    RunConfig,
    build_config,
    key_paths,
    read_yaml,
    with_absolute_paths,
)

if TYPE_CHECKING:
    from offload.batchjob import GenerateConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run models larger than memory, on one machine.",
)

# Flag name -> key path; a flag is the last part of its key, except where that reads badly.
FLAGS = {path.rsplit(".", 1)[-1]: path for path in key_paths()} | {"data": "data.path"}
del FLAGS["path"]

_Text = str | None
_Whole = int | None
_Real = float | None
_Switch = bool | None


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before a command, and keep ``finetune`` a command of its own."""


@app.command()
def finetune(
    context: typer.Context,
    config: Annotated[_Text, Option(help="YAML file of settings; flags override it.")] = None,
    model: Annotated[_Text, Option(help="Directory, hub name, or tiny-llama-30m.")] = None,
    data: Annotated[_Text, Option(help="JSONL or text: a file, directory or glob.")] = None,
    output: Annotated[_Text, Option(help="Directory for everything this run writes.")] = None,
    device_memory: Annotated[_Text, Option(help="GPU budget, e.g. 8GiB.")] = None,
    host_memory: Annotated[_Text, Option(help="RAM budget, e.g. 24GiB.")] = None,
    disk: Annotated[_Text, Option(help="Directory for what does not fit in RAM.")] = None,
    disk_memory: Annotated[_Text, Option(help="Disk budget, e.g. 200GiB.")] = None,
    steps: Annotated[_Whole, Option(help="Optimizer steps in all.")] = None,
    warmup: Annotated[_Whole, Option(help="Steps of linear warm-up.")] = None,
    seq_len: Annotated[_Whole, Option(help="Tokens per sequence.")] = None,
    batch_size: Annotated[_Whole, Option(help="Sequences per micro-batch.")] = None,
    accumulate: Annotated[_Whole, Option(help="Micro-batches per step.")] = None,
    eval_fraction: Annotated[_Real, Option(help="Share of the data held out.")] = None,
    eval_every: Annotated[_Whole, Option(help="Steps between evaluations; 0: none.")] = None,
    save_every: Annotated[_Whole, Option(help="Steps between checkpoints; 0: none.")] = None,
    lr: Annotated[_Real, Option(help="Peak learning rate.")] = None,
    weight_decay: Annotated[_Real, Option(help="AdamW's decay of matrices.")] = None,
    max_grad_norm: Annotated[_Real, Option(help="Clip gradients to this norm; 0: off.")] = None,
    state_dtype: Annotated[
        _Text, Option(help="Optimizer state in bf16 or int8; without: as AdamW keeps it.")
    ] = None,
    step_in_backward: Annotated[
        _Switch,
        Option(
            "--step-in-backward/--no-step-in-backward",
            help="Update during backward: same numbers, less to move. Needs --max-grad-norm 0.",
        ),
    ] = None,
    dtype: Annotated[_Text, Option(help="Parameters in float32 or bfloat16.")] = None,
    bf16: Annotated[_Switch, Option("--bf16/--no-bf16", help="Compute in bfloat16.")] = None,
    gradient_checkpointing: Annotated[
        _Switch,
        Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Trade time for RAM."),
    ] = None,
    seed: Annotated[_Whole, Option(help="Fixes initial weights, order and dropout.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint.")] = False,
    as_json: Annotated[bool, Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Fine-tune a causal language model within memory budgets, resumable at any time."""
    # Every parameter above is read from the context, by its name.
    given = {FLAGS[k]: v for k, v in context.params.items() if k in FLAGS and v is not None}
    _run(effective_config(given, config, resume=resume), resume=resume, as_json=as_json)


app.command("plan")(plan_command)
app.command("report")(report_command)


@app.command()
def generate(
    model: Annotated[str, Option(help="Directory or hub name.")],
    prompts: Annotated[
        str, Option(help='JSON lines: {"prompt": ...} or {"messages": [...]}, with "id" or not.')
    ],
    out: Annotated[str, Option(help="JSON lines of results; what is there is not done again.")],
    device_memory: Annotated[_Text, Option(help="GPU budget, e.g. 8GiB.")] = None,
    host_memory: Annotated[_Text, Option(help="RAM budget, e.g. 24GiB.")] = None,
    disk: Annotated[_Text, Option(help="Directory for what does not fit in RAM.")] = None,
    disk_memory: Annotated[_Text, Option(help="Disk budget, e.g. 200GiB.")] = None,
    max_new_tokens: Annotated[int, Option(help="Tokens of a row at most.")] = 128,
    temperature: Annotated[float, Option(help="0: the likeliest token.")] = 0.0,
    top_p: Annotated[float, Option(help="Draw from this share of the probability.")] = 1.0,
    top_k: Annotated[int, Option(help="Draw from so many tokens; 0: from all.")] = 0,
    seed: Annotated[int, Option(help="Fixes what is drawn, row by row.")] = 0,
    stop: Annotated[
        list[str] | None, Option(help="A row ends before this text; may be given again.")
    ] = None,
    batch: Annotated[_Whole, Option(help="Rows in a micro-batch; without: what fits.")] = None,
    micro_batches: Annotated[_Whole, Option(help="Micro-batches at once, with --batch.")] = None,
    kv_memory: Annotated[
        _Text, Option(help="Keys and values in so much RAM, e.g. 2GiB, the rest on disk.")
    ] = None,
    kv_dtype: Annotated[_Text, Option(help="Keys and values coded in int4 or int2.")] = None,
    dtype: Annotated[_Text, Option(help="Weights in float32 or bfloat16.")] = None,
    with_prompt: Annotated[bool, Option("--with-prompt", help="Repeat it in each row.")] = False,
    as_json: Annotated[bool, Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Go on with many prompts, within memory budgets; run again after a crash to do the rest."""
    if micro_batches is not None and batch is None:
        raise InputError("--micro-batches needs --batch")
    _quiet_transformers()
    from offload.batchjob import GenerateConfig
    from offload.blockcaches import KVAsked
    from offload.places import BlockPlan
    from offload.sampling import Sampling
    from offload.throughput import Asked

    plan = BlockPlan(batch, micro_batches or 1) if batch is not None else None
    asked = Asked(
        max_new_tokens, Sampling(temperature, top_k, top_p, seed), tuple(stop or ()), plan,
        KVAsked(kv_memory, kv_dtype),
    )  # fmt: skip
    memory = MemoryConfig(device_memory, host_memory, _absolute(disk), disk_memory)
    place = Path(model).expanduser()
    _generate(
        GenerateConfig(
            str(place.absolute()) if place.is_dir() else model, Path(prompts).expanduser(),
            Path(out).expanduser(), asked, memory, dtype, with_prompt,
        ),
        as_json=as_json,
    )  # fmt: skip


@app.command()
def probe(
    disk: Annotated[str, Option(help="Directory on the disk to measure.")] = ".",
    as_json: Annotated[bool, Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure the disk (each direction and both at once) and host copies; remember the result."""
    import json

    from offload.tiers.probe import probe as measure
    from offload.tiers.probe import remember, remembered_at

    folder = Path(disk).expanduser()
    machine = measure(folder)
    remember(folder, machine)
    if as_json:
        typer.echo(json.dumps(machine.to_dict()))
        return
    for name, what in (
        ("read_bytes_per_s", "disk read, alone"),
        ("write_bytes_per_s", "disk write, alone"),
        ("mixed_read_bytes_per_s", "disk read while writing"),
        ("mixed_write_bytes_per_s", "disk write while reading"),
        ("copy_bytes_per_s", "memory copy, one thread"),
    ):
        typer.echo(f"{what:26}{machine.to_dict()[name] / 1e9:8.2f} GB/s")
    typer.echo(f"kept in {remembered_at(folder)}")


def effective_config(given: dict[str, Any], yaml_file: str | None, *, resume: bool) -> RunConfig:
    """Flags over the YAML file over defaults; a resumed run starts from its own ``config.yaml``."""
    if yaml_file is None and resume:
        own = Path(build_config(given).output).expanduser() / "config.yaml"
        yaml_file = str(own) if own.is_file() else None
    base = read_yaml(Path(yaml_file).expanduser()) if yaml_file else {}
    return with_absolute_paths(build_config(base | given))


def _absolute(folder: str | None) -> str | None:
    return str(Path(folder).expanduser().absolute()) if folder else None


def _quiet_transformers() -> None:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our own line says it; read at import
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _generate(config: GenerateConfig, *, as_json: bool) -> None:
    from offload.batchjob import generate as run
    from offload.progress import choose_observer

    observer = choose_observer(as_json=as_json)
    outcome = run(config, observer=observer)
    done = outcome.done_before + outcome.rows
    observer.event(
        "stopped" if outcome.stopped_by else "done",
        {"rows": done, "total": outcome.total, "out": str(config.out)},
    )
    observer.note(f"{done:,} of {outcome.total:,} rows in {config.out}")
    if outcome.stopped_by:
        observer.note("stopped; run the same command again for the rest")
        raise typer.Exit(128 + outcome.stopped_by)


def _run(config: RunConfig, *, resume: bool, as_json: bool) -> None:
    _quiet_transformers()
    from offload.finetune import finetune
    from offload.progress import choose_observer

    observer = choose_observer(as_json=as_json)
    outcome = finetune(config, resume=resume, observer=observer)
    observer.event(
        "stopped" if outcome.stopped_by else "done",
        {"step": outcome.step, "loss": outcome.loss, "output": config.output},
    )
    if outcome.stopped_by:
        again = f"offload finetune --config {config.output}/config.yaml --resume"
        observer.note(f"stopped after step {outcome.step}; continue with: {again}")
        raise typer.Exit(128 + outcome.stopped_by)


def main() -> None:
    """Entry point: what users can mend is one line on stderr and exit status 2; Ctrl-C is 130."""
    try:
        app(standalone_mode=True)
    except (OffloadError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
