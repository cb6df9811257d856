"""The options of all commands, each in one place: one name, one meaning, one help text.

A flag that was not given is None, so that the ``--config`` file and then the default can speak;
the defaults that help shows are those of the settings classes, which a test compares.
"""

from __future__ import annotations

from typing import Annotated

from typer import Option

_RUN, _MEMORY, _DATA = "The run", "Memory", "Data"
_STEPS, _NUMBERS, _TOKENS, _SAID = "Steps", "Numbers", "Tokens", "What is said"

# -- how a command talks ------------------------------------------------------------------------

Config = Annotated[
    str | None,
    Option(metavar="FILE", help="YAML file of settings; flags override it.", rich_help_panel=_RUN),
]
DryRun = Annotated[
    bool,
    Option("--dry-run", help="Check everything, say what would be done, and end.",
           rich_help_panel=_RUN),
]  # fmt: skip
AsJson = Annotated[
    bool, Option("--json", help="JSON on stdout, one object a line.", rich_help_panel=_SAID)
]
Verbose = Annotated[
    bool,
    Option("--verbose", "-v", help="Also the settings, more of each step, and errors in full.",
           rich_help_panel=_SAID),
]  # fmt: skip
Quiet = Annotated[
    bool, Option("--quiet", "-q", help="Only warnings and errors.", rich_help_panel=_SAID)
]

# -- budgets ------------------------------------------------------------------------------------

DeviceMemory = Annotated[
    str | None,
    Option(help="GPU budget, e.g. 8GiB.", show_default="80% of what is free",
           rich_help_panel=_MEMORY),
]  # fmt: skip
HostMemory = Annotated[
    str | None,
    Option(help="RAM budget, e.g. 24GiB.", show_default="80% of what is free",
           rich_help_panel=_MEMORY),
]  # fmt: skip
Disk = Annotated[
    str | None,
    Option(metavar="DIR", help="Directory for what does not fit in RAM.", show_default="no disk",
           rich_help_panel=_MEMORY),
]  # fmt: skip
DiskMemory = Annotated[
    str | None,
    Option(help="Disk budget, e.g. 200GiB.", show_default="what is free", rich_help_panel=_MEMORY),
]
KvMemory = Annotated[
    str | None,
    Option(help="Keys and values in so much RAM, e.g. 2GiB, the rest on disk.",
           show_default="all in RAM", rich_help_panel=_MEMORY),
]  # fmt: skip
KvDtype = Annotated[
    str | None,
    Option(help="Keys and values coded in int4 or int2.", show_default="as computed",
           rich_help_panel=_MEMORY),
]  # fmt: skip
Attention = Annotated[
    str | None,
    Option(help="To keys and values on the host, with a GPU: auto, host or device.",
           show_default="auto", rich_help_panel=_MEMORY),
]  # fmt: skip

# -- what is read and written -------------------------------------------------------------------

TrainedModel = Annotated[
    str | None,
    Option(help="Directory, hub name, or tiny-llama-30m.", show_default="tiny-llama-30m",
           rich_help_panel=_RUN),
]  # fmt: skip
Model = Annotated[
    str | None,
    Option(help="Directory or hub name. Required.", rich_help_panel=_RUN),
]
RunOutput = Annotated[
    str | None,
    Option(metavar="DIR", help="Directory for everything this run writes.",
           show_default="runs/finetune", rich_help_panel=_RUN),
]  # fmt: skip
RowsOutput = Annotated[
    str | None,
    Option(metavar="FILE", help="JSON lines of results; what is there is not done again. Required.",
           rich_help_panel=_RUN),
]  # fmt: skip
Resume = Annotated[
    bool, Option("--resume", help="Go on from the newest checkpoint.", rich_help_panel=_RUN)
]
Data = Annotated[
    str | None,
    Option(help="JSONL or text: a file, directory or glob.",
           show_default="Python's own sources", rich_help_panel=_DATA),
]  # fmt: skip
Prompts = Annotated[
    str | None,
    Option(metavar="FILE", help='JSON lines: {"prompt": ...} or {"messages": ...}, with "id" or '
           "not. Required.", rich_help_panel=_RUN),
]  # fmt: skip
WithPrompt = Annotated[
    bool | None,
    Option("--with-prompt/--no-with-prompt", help="Repeat it in each row.", show_default="no",
           rich_help_panel=_RUN),
]  # fmt: skip
SeqLen = Annotated[
    int | None, Option(help="Tokens per sequence.", show_default="512", rich_help_panel=_DATA)
]
BatchSize = Annotated[
    int | None,
    Option(help="Sequences per micro-batch.", show_default="1", rich_help_panel=_DATA),
]
RowsAtOnce = Annotated[
    int | None,
    Option("--batch-size", help="Sequences per micro-batch.", show_default="what fits",
           rich_help_panel=_TOKENS),
]  # fmt: skip
MicroBatches = Annotated[
    int | None,
    Option(help="Micro-batches at once, with --batch-size.", show_default="1",
           rich_help_panel=_TOKENS),
]  # fmt: skip
Accumulate = Annotated[
    int | None, Option(help="Micro-batches per step.", show_default="1", rich_help_panel=_DATA)
]
EvalFraction = Annotated[
    float | None,
    Option(help="Share of the data held out.", show_default="0.01", rich_help_panel=_DATA),
]

# -- steps --------------------------------------------------------------------------------------

Steps = Annotated[
    int | None, Option(help="Optimizer steps in all.", show_default="100", rich_help_panel=_STEPS)
]
Warmup = Annotated[
    int | None,
    Option(help="Steps of linear warm-up.", show_default="a tenth of the steps, at most 100",
           rich_help_panel=_STEPS),
]  # fmt: skip
EvalEvery = Annotated[
    int | None,
    Option(help="Steps between evaluations; 0: none.", show_default="50", rich_help_panel=_STEPS),
]
SaveEvery = Annotated[
    int | None,
    Option(help="Steps between checkpoints; 0: none.", show_default="100", rich_help_panel=_STEPS),
]

# -- numbers ------------------------------------------------------------------------------------

Lr = Annotated[
    float | None,
    Option(help="Peak learning rate.", show_default="2e-05; 0.001 for tiny-llama-30m",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
WeightDecay = Annotated[
    float | None,
    Option(help="AdamW's decay of matrices.", show_default="0.01", rich_help_panel=_NUMBERS),
]
MaxGradNorm = Annotated[
    float | None,
    Option(help="Clip gradients to this norm; 0: off.", show_default="1.0",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
StateDtype = Annotated[
    str | None,
    Option(help="Optimizer state in bf16 or int8.", show_default="as AdamW keeps it",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
StepInBackward = Annotated[
    bool | None,
    Option("--step-in-backward/--no-step-in-backward", show_default="no",
           help="Update during backward: same numbers, less to move. Needs --max-grad-norm 0.",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
TrainedDtype = Annotated[
    str | None,
    Option("--dtype", help="Weights in float32 or bfloat16.", show_default="float32",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
Dtype = Annotated[
    str | None,
    Option("--dtype", help="Weights in float32 or bfloat16.", show_default="the model's own",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
Bf16 = Annotated[
    bool | None,
    Option("--bf16/--no-bf16", help="Compute in bfloat16.", show_default="no",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
GradientCheckpointing = Annotated[
    bool | None,
    Option("--gradient-checkpointing/--no-gradient-checkpointing", help="Trade time for RAM.",
           show_default="no", rich_help_panel=_NUMBERS),
]  # fmt: skip
Seed = Annotated[
    int | None,
    Option(help="Fixes everything that is drawn at random.", show_default="0",
           rich_help_panel=_NUMBERS),
]  # fmt: skip

# -- tokens -------------------------------------------------------------------------------------

MaxNewTokens = Annotated[
    int | None, Option(help="Tokens of a row at most.", show_default="128", rich_help_panel=_TOKENS)
]
Temperature = Annotated[
    float | None,
    Option(help="0: the likeliest token.", show_default="0.0", rich_help_panel=_TOKENS),
]
TopP = Annotated[
    float | None,
    Option(help="Draw from this share of the probability.", show_default="1.0",
           rich_help_panel=_TOKENS),
]  # fmt: skip
TopK = Annotated[
    int | None,
    Option(help="Draw from so many tokens; 0: from all.", show_default="0",
           rich_help_panel=_TOKENS),
]  # fmt: skip
Stop = Annotated[
    list[str] | None,
    Option(metavar="TEXT", help="A row ends before this text; may be given again.",
           show_default="none", rich_help_panel=_TOKENS),
]  # fmt: skip

# -- what is planned ----------------------------------------------------------------------------

PlannedModel = Annotated[
    str | None,
    Option("--model", help="Directory, config.json or hub name; no weights are read. Required.",
           rich_help_panel=_RUN),
]  # fmt: skip
Task = Annotated[
    str | None,
    Option(help="finetune or generate.", show_default="generate, unless optimizer settings are "
           "given", rich_help_panel=_RUN),
]  # fmt: skip
MachineName = Annotated[
    str | None,
    Option("--machine", help="One of the table (docs/plan.md) or a JSON file.",
           show_default="this one, measured", rich_help_panel=_RUN),
]  # fmt: skip
PlannedDevice = Annotated[
    str | None,
    Option("--device-memory", help="GPU budget, e.g. 8GiB.", show_default="80% of the machine's",
           rich_help_panel=_MEMORY),
]  # fmt: skip
PlannedHost = Annotated[
    str | None,
    Option("--host-memory", help="RAM budget, e.g. 24GiB.", rich_help_panel=_MEMORY,
           show_default="80% of the machine's; to generate it is required"),
]  # fmt: skip
PlannedDisk = Annotated[
    str | None,
    Option("--disk", metavar="DIR", help="Directory on the disk that would be used.",
           show_default=".", rich_help_panel=_MEMORY),
]  # fmt: skip
PlannedDiskMemory = Annotated[
    str | None,
    Option("--disk-memory", help="Disk budget, e.g. 200GiB.", show_default="80% of the machine's",
           rich_help_panel=_MEMORY),
]  # fmt: skip
Method = Annotated[
    str | None,
    Option(help="What is trained: full or lora.", show_default="full", rich_help_panel=_NUMBERS),
]
Rank = Annotated[
    int | None,
    Option(help="Of LoRA's adapters, at all linear layers.", show_default="16",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
PlannedDtype = Annotated[
    str | None,
    Option("--dtype", help="Weights in float32 or bfloat16.", rich_help_panel=_NUMBERS,
           show_default="float32; to generate the model's own"),
]  # fmt: skip
ComputeDtype = Annotated[
    str | None,
    Option(help="What a GPU computes in.", show_default="as --dtype", rich_help_panel=_NUMBERS),
]
WeightDtype = Annotated[
    str | None,
    Option(help="Frozen weights in int4 or int8.", show_default="as --dtype",
           rich_help_panel=_NUMBERS),
]  # fmt: skip
PromptCount = Annotated[
    int | None,
    Option(help="How many prompts there are.", show_default="1", rich_help_panel=_TOKENS),
]
PromptTokens = Annotated[
    int | None, Option(help="Tokens of each.", show_default="64", rich_help_panel=_TOKENS)
]
KvTiers = Annotated[
    bool | None,
    Option("--kv-tiers/--no-kv-tiers", help="Keys and values may go to disk.", show_default="no",
           rich_help_panel=_MEMORY),
]  # fmt: skip
Advice = Annotated[
    bool | None,
    Option("--advice/--no-advice", help="Say which changes would help.", show_default="yes",
           rich_help_panel=_SAID),
]  # fmt: skip

# -- the machine --------------------------------------------------------------------------------

ProbedDisk = Annotated[
    str | None,
    Option("--disk", metavar="DIR", help="Directory on the disk to measure.", show_default=".",
           rich_help_panel=_RUN),
]  # fmt: skip
