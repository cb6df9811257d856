"""``runtime.generate``: many prompts through a model that is larger than memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from offload.block import Block, BlockStep, Row, generation_config
from offload.blockcaches import KVAsked, caches_for, provide
from offload.blockroom import longest_prompt, positions_of
from offload.ending import Ending
from offload.errors import OffloadError
from offload.places import BlockPlan
from offload.rowchoice import RowChoice, RowChooser
from offload.sampling import Sampling

if TYPE_CHECKING:
    from offload.run import Runtime

Prompt = str | Sequence[int] | Tensor
UNAPPLIED = {  # what a generation_config may ask for, and what it says where it does not
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1.0,
    "min_length": 0, "min_new_tokens": 0, "sequence_bias": None, "num_beams": 1,
    "num_return_sequences": 1, "exponential_decay_length_penalty": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """How to go on with each prompt. ``plan`` None: as the policy search says, or as many as fit.

    ``kv``: keys and values in tiers, or as transformers keeps them where nothing is asked for.

    Raises ValueError for what is out of range.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    plan: BlockPlan | None = None
    kv: KVAsked = field(default_factory=KVAsked)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not all(self.stop):
            raise ValueError("a stop string is empty: it would end every row at once")


def make_block(
    run: Runtime, prompts: Mapping[int, Sequence[int]], asked: Asked, tokenizer: Any = None
) -> Block:
    """The run of these rows (token ids). Raises as ``Runtime.generate``."""
    model, parts = run.model, run.parts
    generation = generation_config(model)
    config: Any = model.config
    eos = generation.eos_token_id
    ending = Ending(
        asked.max_new_tokens,
        frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos),
        positions_of(config),
        asked.stop,
        _reader(tokenizer) if tokenizer is not None else None,
    )
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    for row, prompt in prompts.items():
        _check(row, prompt, longest_prompt(config), vocabulary)
    _say_what_is_not_applied(generation)
    caches = caches_for(model, parts, run.given, asked.kv)
    lengths = [len(prompt) for prompt in prompts.values()]
    if asked.plan is not None:
        run.rows = RowChoice(asked.plan, "caller", "as asked for")
    else:
        work = lengths, ending.new_tokens, caches.cost
        run.rows = RowChooser(model, parts, run.given, *work).choose()
    provision = provide(model, parts, lengths, ending.new_tokens, run.rows.plan, caches)
    return Block(model, parts, prompts, ending, asked.sampling, provision)


def generate(
    run: Runtime, prompts: Sequence[Prompt], asked: Asked, tokenizer: Any,
    on_step: Callable[[BlockStep], None] | None,
) -> list[Row]:  # fmt: skip
    """See ``Runtime.generate``."""
    ids = {row: token_ids(prompt, tokenizer) for row, prompt in enumerate(prompts)}
    if not ids:
        return []
    rows: list[Row] = []
    block = make_block(run, ids, asked, tokenizer)
    if run.rows is not None and run.rows.by != "caller" and len(ids) > 1:
        print(f"offload: generate(): {run.rows}", file=sys.stderr)
    for step in block.steps():
        rows += step.finished
        if on_step is not None:
            on_step(step)
    return sorted(rows, key=lambda row: row.index)


def _check(row: int, prompt: Sequence[int], most: int | None, vocabulary: int) -> None:
    if not prompt:
        raise OffloadError(f"generate(): prompt {row} is empty; begin it with a token")
    if most is not None and len(prompt) > most:
        raise OffloadError(
            f"generate(): prompt {row} has {len(prompt)} tokens, but the model takes {most}; "
            "shorten it"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocabulary:
        raise OffloadError(
            f"generate(): prompt {row} has tokens from {min(prompt)} to {max(prompt)}, but the "
            f"model has {vocabulary} of them; is it this model's tokenizer?"
        )


def _say_what_is_not_applied(generation: Any) -> None:
    asked = [
        f"{name}={value!r}" for name, default in UNAPPLIED.items()
        if (value := getattr(generation, name, default)) not in (None, default)
    ]  # fmt: skip
    if asked:
        print(
            "offload: generate() does not apply what the model's generation_config asks for: "
            f"{', '.join(asked)}; model.generate() does",
            file=sys.stderr,
        )


def token_ids(prompt: Prompt, tokenizer: Any) -> list[int]:
    """A prompt as token ids; text needs the tokenizer. Raises OffloadError without."""
    if isinstance(prompt, Tensor):
        return [int(token) for token in prompt.reshape(-1)]
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise OffloadError("generate(): prompts that are text need tokenizer=...")
    return list(map(int, tokenizer(prompt)["input_ids"]))


def _reader(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True))
