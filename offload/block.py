"""Generation for throughput: every step loads each unit's weights once for all rows there are.

One step is one forward pass of every cohort (see places.py), new ones with their prompts, others
with one token a row. Cohorts run the unmodified model side by side, as in ring.py: all pass a
unit before the next is loaded, which is FlexGen's block schedule (Sheng et al. 2023). Rows that
end leave at once, and others take their places.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from offload.blockcaches import Provision
from offload.calls import Call
from offload.cohort import Cohort, Dialect
from offload.ending import Ending
from offload.engine import Engine
from offload.errors import OffloadError
from offload.hooks import Hooks
from offload.ledger import Other
from offload.limits import limit_of
from offload.parts import Parts
from offload.places import BlockPlan, Places
from offload.ring import InRing, Ring, run_in_turns
from offload.sampling import Picker, Sampling
from offload.steps import Kind

Works = Sequence[Callable[[], None]]  # one pass each


@dataclass(frozen=True, slots=True)
class Row:
    """One finished row. ``tokens``: what was generated, the end token too; ``text``: without it,
    up to a stop string, None without a tokenizer; ``reason``: "eos", "stop" or "length".
    """

    index: int
    tokens: tuple[int, ...]
    reason: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class BlockStep:
    """What one step did. ``new_tokens``: one for each row that had a place; ``prompt_tokens``: of
    the rows that began; ``bound_s``: the least that a step like this can take, None: not known.
    """

    finished: tuple[Row, ...]
    new_tokens: int
    prompt_tokens: int
    step_s: float
    bound_s: float | None
    micro_batches: int


class Block:
    """Runs rows of prompts (token ids, by the number that a row is called and seeded by).

    ``provision``: how many at once, and the caches. ``steps`` raises BudgetError where there is no
    room.
    """

    def __init__(
        self, model: nn.Module, parts: Parts, prompts: Mapping[int, Sequence[int]],
        ending: Ending, sampling: Sampling, provision: Provision,
    ) -> None:  # fmt: skip
        self._model = model
        self._parts = parts
        self._prompts = prompts
        self._ending = ending
        self._picker = Picker(sampling)
        self._dialect = Dialect.of(model)
        self._provision = provision
        lengths = {row: len(prompt) for row, prompt in prompts.items()}
        self._places = Places(lengths, provision.plan, pads=self._dialect.pads)

    @property
    def plan(self) -> BlockPlan:
        """How many rows at once."""
        return self._provision.plan

    def steps(self) -> Generator[BlockStep, None, None]:
        """Until every row has ended. Memory is given back when this ends or is closed."""
        provision, caches = self._provision, self._provision.caches
        cohorts: list[Cohort] = []
        written: dict[int, list[int]] = {}
        with (
            _evaluating(self._model),
            caches.opened(provision.plan),
            _reserved(self._parts, provision),
        ):
            while not self._places.over:
                began_s = time.perf_counter()
                begun = self._places.admit()
                for rows in begun:
                    prompts = [self._prompts[row] for row in rows]
                    # The last token that is generated is not fed again.
                    tokens = max(map(self._dialect.fed, prompts)) + self._ending.new_tokens - 1
                    cohorts.append(self._dialect.begin(rows, prompts, caches.new(tokens)))
                picked = self._forward(cohorts)
                finished = self._settle(cohorts, picked, written)
                for cohort in cohorts:
                    if not cohort.rows:
                        caches.end(cohort.cache)
                cohorts = [cohort for cohort in cohorts if cohort.rows]
                yield BlockStep(
                    finished=finished,
                    new_tokens=sum(map(len, picked)),
                    prompt_tokens=sum(len(self._prompts[row]) for rows in begun for row in rows),
                    step_s=time.perf_counter() - began_s,
                    bound_s=_bound_s(self._parts),
                    micro_batches=len(picked),
                )

    def _forward(self, cohorts: Sequence[Cohort]) -> list[list[int]]:
        """The next token of each row of each cohort."""
        picked: list[list[int]] = [[] for _ in cohorts]

        def encode(index: int) -> None:
            with torch.no_grad():
                cohorts[index].encode(self._model)

        def work(index: int) -> None:
            with torch.no_grad():
                logits = cohorts[index].forward(self._model)
                picked[index] = self._picker.pick(logits, cohorts[index].rows)

        cost = self._provision.caches.cost
        # First all new prompts go through the encoder, so that its weights too are loaded once.
        first = [partial(encode, i) for i, c in enumerate(cohorts) if c.encodes]
        stages = [first, [partial(work, i) for i in range(len(cohorts))]]
        turn_bytes = max(cost.turn_bytes(c.call.tokens, c.call.extent // 2) for c in cohorts)
        _one_step(self._parts, _call(cohorts), stages, turn_bytes)
        # transformers' caches are copied as they grow, and malloc keeps what they leave.
        self._parts.engine.ledger.passed(self._provision.passing_bytes)
        return picked

    def _settle(
        self, cohorts: Sequence[Cohort], picked: list[list[int]], written: dict[int, list[int]]
    ) -> tuple[Row, ...]:
        """Give the rows their tokens; those that end by them are taken out."""
        finished: list[Row] = []
        for cohort, tokens in zip(cohorts, picked, strict=True):
            going = []
            for row, token in zip(cohort.rows, tokens, strict=True):
                new = written.setdefault(row, [])
                new.append(token)
                reason = self._ending.reason(self._dialect.fed(self._prompts[row]), new)
                if reason is None:
                    going.append(row)
                    continue
                text = self._ending.text(new, reason)
                finished.append(Row(row, tuple(written.pop(row)), reason, text))
                self._places.leave(row)
                self._picker.forget(row)
            cohort.push(tokens)
            cohort.keep(going)
        return tuple(finished)


def _call(cohorts: Sequence[Cohort]) -> Call:
    """What one step of all of them is planned as."""
    calls = [cohort.call for cohort in cohorts]
    goes_on = all(call.goes_on for call in calls)
    return Call("", goes_on, sum(c.tokens for c in calls), sum(c.extent for c in calls))


def _one_step(parts: Parts, call: Call, stages: Sequence[Works], turn_bytes: int) -> None:
    """One pass in each of a stage's works, side by side; all stages together are one step."""
    hooks = parts.hooks
    if hooks is None:
        raise OffloadError("generate(): this run is closed")
    if not isinstance(hooks, Hooks):  # frames: one after the other
        for work in (work for works in stages for work in works):
            work()
        return
    with hooks.one_step(call):
        for works in stages:
            _side_by_side(parts, hooks, works, turn_bytes)


def _side_by_side(parts: Parts, hooks: Hooks, works: Works, turn_bytes: int) -> None:
    if len(works) <= 1 or parts.engine.space.disk is None:
        for work in works:
            work()
        return
    # Each thread has a malloc arena of its own, which keeps what its pass gives back.
    ring = Ring(len(works), lambda _: parts.engine.ledger.passed(turn_bytes))
    run_in_turns(ring, [partial(_in_turn, hooks, InRing(ring, i), w)
                        for i, w in enumerate(works)])  # fmt: skip
    error, ring.error = ring.error, None  # no cycle
    try:
        if error is not None:
            raise error
    finally:
        del error


def _in_turn(hooks: Hooks, turn: InRing, work: Callable[[], None]) -> None:
    with hooks.taking_turns(turn):
        work()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout meanwhile; each module is then again as it was."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True


@contextmanager
def _reserved(parts: Parts, provision: Provision) -> Iterator[None]:
    """Memory for keys, values and activations, taken once, so that plans can count on the rest."""
    what = "the block of rows to generate (keys, values, activations)"
    levels = [(parts.engine, parts.steps)]
    if parts.device is not None:
        levels.append((parts.device.engine, parts.device.steps))
    with ExitStack() as undo:
        for engine, steps in levels:
            shares = _shares(parts, provision, engine)
            engine.make_room_for(sum(shares.values()), what)
            for kind, size_bytes in shares.items():
                engine.take_other(size_bytes, what, kind)
                undo.callback(engine.ledger.give_other, size_bytes, kind)
            steps.forget(Kind.INFER)  # planned with other room
            undo.callback(steps.forget, Kind.INFER)
            steps.constant_bytes = sum(shares.values())
            undo.callback(setattr, steps, "constant_bytes", 0)
        yield


def _shares(parts: Parts, provision: Provision, engine: Engine) -> dict[Other, int]:
    """What one tier holds of the block: keys and values in tiers are the host's."""
    tiered = provision.caches.cost.kv
    if engine is parts.computing:
        rest = provision.reserved_bytes - provision.kv_bytes
        kv_bytes = provision.kv_bytes - provision.crossing_bytes
        return {Other.KV: kv_bytes, Other.ACTIVATIONS: rest}
    return {Other.KV: tiered.memory_bytes if tiered is not None else 0}


def _bound_s(parts: Parts) -> float | None:
    """The bound of the inference step that is planned now."""
    limit = limit_of(parts, Kind.INFER)
    return limit.bound_s if limit is not None else None


def generation_config(model: Any) -> Any:
    """The model's own. Raises OffloadError for what is no Hugging Face model that generates."""
    config = getattr(model, "generation_config", None)
    if config is None or getattr(model, "config", None) is None:
        raise OffloadError(
            f"{type(model).__name__} has no generation_config: runtime.generate() is for Hugging "
            "Face models that can generate"
        )
    return config
