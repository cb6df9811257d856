"""``offload generate``: flags over the YAML file over defaults, then the run of batchjob.py."""

from __future__ import annotations

import typer

from offload import options
from offload.command import Voice, epilog, file_values, flags_given, quiet_transformers, show_plan
from offload.command import voice as voice_of
from offload.generateconfig import GenerateConfig, build_generate
from offload.settings import flags_of, to_yaml

FLAGS = flags_of(GenerateConfig)
EPILOG = epilog(
    "offload generate --model DIR --prompts in.jsonl --output out.jsonl --host-memory 8GiB"
    " --disk /scratch",
    "offload generate --config rows.yaml --temperature 0.7 --dry-run",
)


def generate(
    context: typer.Context,
    config: options.Config = None,
    model: options.Model = None,
    prompts: options.Prompts = None,
    output: options.RowsOutput = None,
    with_prompt: options.WithPrompt = None,
    dry_run: options.DryRun = False,
    device_memory: options.DeviceMemory = None,
    host_memory: options.HostMemory = None,
    disk: options.Disk = None,
    disk_memory: options.DiskMemory = None,
    kv_memory: options.KvMemory = None,
    kv_dtype: options.KvDtype = None,
    attention: options.Attention = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    stop: options.Stop = None,
    batch_size: options.RowsAtOnce = None,
    micro_batches: options.MicroBatches = None,
    dtype: options.Dtype = None,
    seed: options.Seed = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Go on with many prompts, within memory budgets; run again after a crash to do the rest.

    Ctrl-C ends the run after the step, with the rows that ended; a second one ends it at once.
    """
    # The settings among the parameters above are read from the context, by their names.
    voice = voice_of(context, as_json=as_json, verbose=verbose, quiet=quiet)
    made = build_generate(file_values(config, GenerateConfig) | flags_given(context, FLAGS))
    quiet_transformers()
    if dry_run:
        _dry_run(made, voice)
    else:
        _run(made, voice)


def _run(config: GenerateConfig, voice: Voice) -> None:
    from offload.batchjob import generate as run

    observer = voice.observer()
    if voice.verbose:
        observer.note(to_yaml(config))
    outcome = run(config, observer=observer)
    done = outcome.done_before + outcome.rows
    observer.event(
        "stopped" if outcome.stopped_by else "done",
        {"rows": done, "total": outcome.total, "output": config.output},
    )
    observer.note(f"{done:,} of {outcome.total:,} rows in {config.output}")
    if outcome.stopped_by:
        observer.note("stopped; run the same command again for the rest")
        raise typer.Exit(128 + outcome.stopped_by)


def _dry_run(config: GenerateConfig, voice: Voice) -> None:
    """Everything that a run does before the model is loaded."""
    import torch

    from offload.batchjob import describe, done_before, prepare
    from offload.placement import empty_model, place
    from offload.preflight import read_model_config

    job = prepare(config, dry=True)
    before = done_before(job)
    dtype = getattr(torch, config.compute.dtype) if config.compute.dtype else None
    placement = place(empty_model(read_model_config(config.model), dtype), config.memory)
    facts = {
        "prompts": len(job.lines), "prompt_tokens": sum(map(len, job.ids)), "done_before": before,
        "placement": placement.to_dict(),
    }  # fmt: skip
    show_plan(voice, config, facts, [describe(job, before), *placement.lines()])
