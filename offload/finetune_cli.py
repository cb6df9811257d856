"""``offload finetune``: flags over the YAML file over defaults, then the run of finetune.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from offload import options
from offload.command import Voice, epilog, file_values, flags_given, quiet_transformers, show_plan
from offload.command import voice as voice_of
from offload.runconfig import RunConfig, build_config, with_absolute_paths
from offload.settings import flags_of, to_yaml

FLAGS = flags_of(RunConfig)
EPILOG = epilog(
    "offload finetune --model DIR --data train.jsonl --host-memory 8GiB --disk /scratch"
    " --output runs/mine",
    "offload finetune --config run.yaml --lr 1e-5 --dry-run",
    "offload finetune --config runs/mine/config.yaml --resume",
)


def finetune(
    context: typer.Context,
    config: options.Config = None,
    model: options.TrainedModel = None,
    output: options.RunOutput = None,
    resume: options.Resume = False,
    dry_run: options.DryRun = False,
    data: options.Data = None,
    seq_len: options.SeqLen = None,
    batch_size: options.BatchSize = None,
    accumulate: options.Accumulate = None,
    eval_fraction: options.EvalFraction = None,
    steps: options.Steps = None,
    warmup: options.Warmup = None,
    eval_every: options.EvalEvery = None,
    save_every: options.SaveEvery = None,
    device_memory: options.DeviceMemory = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_memory: options.DiskMemory = None,
    lr: options.Lr = None,
    weight_decay: options.WeightDecay = None,
    max_grad_norm: options.MaxGradNorm = None,
    state_dtype: options.StateDtype = None,
    step_in_backward: options.StepInBackward = None,
    dtype: options.TrainedDtype = None,
    bf16: options.Bf16 = None,
    gradient_checkpointing: options.GradientCheckpointing = None,
    seed: options.Seed = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Fine-tune a causal language model within memory budgets, resumable at any time.

    Ctrl-C ends the run after the step, with a checkpoint; a second one ends it at once.
    """
    # The settings among the parameters above are read from the context, by their names.
    voice = voice_of(context, as_json=as_json, verbose=verbose, quiet=quiet)
    made = effective_config(flags_given(context, FLAGS), config, resume=resume)
    quiet_transformers()
    if dry_run:
        _dry_run(made, voice, resume=resume)
    else:
        _run(made, voice, resume=resume)


def effective_config(given: dict[str, Any], yaml_file: str | None, *, resume: bool) -> RunConfig:
    """Flags over the YAML file over defaults; a resumed run starts from its own ``config.yaml``."""
    if yaml_file is None and resume:
        own = Path(build_config(given).output).expanduser() / "config.yaml"
        yaml_file = str(own) if own.is_file() else None
    return with_absolute_paths(build_config(file_values(yaml_file, RunConfig) | given))


def _run(config: RunConfig, voice: Voice, *, resume: bool) -> None:
    from offload.finetune import finetune as run

    observer = voice.observer()
    if voice.verbose:
        observer.note(to_yaml(config))
    outcome = run(config, resume=resume, observer=observer)
    observer.event(
        "stopped" if outcome.stopped_by else "done",
        {"step": outcome.step, "loss": outcome.loss, "output": config.output},
    )
    if outcome.stopped_by:
        again = f"offload finetune --config {config.output}/config.yaml --resume"
        observer.note(f"stopped after step {outcome.step}; continue with: {again}")
        raise typer.Exit(128 + outcome.stopped_by)


def _dry_run(config: RunConfig, voice: Voice, *, resume: bool) -> None:
    """Everything that a run does before its first step, but no weight is read or made."""
    import torch

    from offload.finetune import describe, make_optimizer
    from offload.placement import empty_model, place
    from offload.preflight import prepare, read_model_config

    job = prepare(config, resume=resume, dry=True)
    model = empty_model(read_model_config(config.model), getattr(torch, config.compute.dtype))
    optimizer = make_optimizer(model, config, fused=False)
    placement = place(model, config.memory, optimizer, config.optimizer.state_dtype)
    facts = {
        "sequences": len(job.train), "held_out": len(job.held_out),
        "checkpoints": [path.name for path in job.rundir.checkpoints()],
        "placement": placement.to_dict(),
    }  # fmt: skip
    show_plan(voice, config, facts, [describe(job), *placement.lines()])
