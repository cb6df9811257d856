"""How many rows a block has at once: the caller's choice, the policy search's, or what fits.

The search (prefetch/search.py) needs to know how fast this model's layers compute. Measuring that
takes seconds and memory for a few layers, so it is done once and kept, as `offload plan` does, and
only for a run that is long enough; the memory is taken from the budget meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from offload.blockroom import block_room_bytes, least_frames_bytes
from offload.config import Given
from offload.errors import BudgetError, OffloadError, SpillError
from offload.hooks import Hooks
from offload.parts import Parts
from offload.places import BlockCost, BlockPlan, choose_block
from offload.prefetch.generation import Policy, Rates, Shape, Workload
from offload.quantised import Quantised
from offload.spare import free_memory_bytes
from offload.tiers import vm
from offload.tiers.disk import DiskFull
from offload.tiers.spec import MIB, Budget, Compute, format_size

if TYPE_CHECKING:
    from offload.prefetch.search import Candidate, Problem

WORTH_S = 60.0  # of reading weights, that a run needs to be worth the measurement's ten
PROBE_BYTES = 112 * MIB  # that measuring attention and reads holds beside the layers
SPARE_BYTES = 128 * MIB  # of the system's, beyond the budget: measuring leaves some 50 MiB behind


@dataclass(frozen=True, slots=True)
class RowChoice:
    """A block, and how it came to be. ``by``: "caller", "search" or "room"; ``why``: in words.

    ``policy``: what the search predicts, where it was asked.
    """

    plan: BlockPlan
    by: str
    why: str
    policy: Policy | None = None

    def __str__(self) -> str:
        said = f"at most {self.plan.micro_batches} micro-batches of {self.plan.batch}"
        if self.policy is None:
            return f"{said} rows at once ({self.why})"
        times = self.policy.times
        return (
            f"{said} rows at once ({self.why}); predicted: {self.policy.tokens_per_s:.2f} tokens/s "
            f"in all, {self.policy.rows / times.pass_s:.2f} after the prompts; "
            f"what binds: {times.binding}"
        )

    def to_dict(self) -> dict[str, Any]:
        """For ``runtime.stats()``."""
        times = self.policy.times if self.policy is not None else None
        return {
            "batch": self.plan.batch,
            "micro_batches": self.plan.micro_batches,
            "chosen_by": self.by,
            "why": self.why,
            "predicted_tokens_per_s": self.policy.tokens_per_s if self.policy else None,
            "predicted_step_s": times.pass_s if times else None,
            "binding": times.binding if times else None,
        }


class RowChooser:
    """Chooses for prompts of these lengths, in tokens, each continued by ``new_tokens``."""

    def __init__(
        self, model: nn.Module, parts: Parts, given: Given, lengths: Sequence[int],
        new_tokens: int, cost: BlockCost,
    ) -> None:  # fmt: skip
        self._model: Any = model
        self._parts = parts
        self._given = given
        self._lengths = lengths
        self._new_tokens = new_tokens
        self._cost = cost
        self._capacity_bytes = parts.computing.ledger.capacity_bytes

    def choose(self) -> RowChoice:
        """By the search where it can be asked, else as many rows as fit."""
        room_bytes = block_room_bytes(self._model, self._parts)
        fitting = choose_block(self._lengths, self._new_tokens, self._cost, room_bytes)
        try:
            self._refuse_to_search(fitting)
            problem = self._problem(fitting)
            policy = self._search(problem)
        except _NotSearchedError as reason:
            return RowChoice(fitting, "room", f"as many as fit: {reason}")
        plan = BlockPlan(policy.batch, policy.micro_batches)
        return RowChoice(plan, "search", "by the policy search, from measured rates", policy)

    def _refuse_to_search(self, fitting: BlockPlan) -> None:
        parts = self._parts
        if len(self._lengths) == 1:
            raise _NotSearchedError("there is one")
        if parts.machine is None or self._given.disk is None:
            raise _NotSearchedError("no weight leaves memory")
        if not isinstance(parts.hooks, Hooks):
            raise _NotSearchedError("the search does not know frames on a device")
        if self._model.config.is_encoder_decoder:
            raise _NotSearchedError("the search does not know encoders")
        if self._cost.kv is not None:
            raise _NotSearchedError("keys and values have a memory of their own")
        if not self._away_bytes(fitting):
            raise _NotSearchedError("no weight has to leave memory for them")

    def _away_bytes(self, plan: BlockPlan) -> int:
        """Of weights, that do not fit beside a block."""
        block_bytes = self._cost.of(plan, self._lengths, self._new_tokens)
        weight_bytes = sum(c.size_bytes for c in self._parts.engine.space.chunks)
        return max(weight_bytes + block_bytes - self._capacity_bytes, 0)

    def _problem(self, fitting: BlockPlan) -> Problem:
        from offload.prefetch.search import Problem
        from offload.shape import read_shape, stored_as

        config, form = stored_as(self._model.config, kept_type(self._model)), form_of(self._model)
        try:
            shape = read_shape(config, form)
        except OffloadError as error:
            raise _NotSearchedError(str(error).removeprefix("plan: ")) from None
        machine = self._parts.machine
        assert machine is not None
        rates = Rates(machine, self._compute(shape, config, form, fitting))
        mean = -(-sum(self._lengths) // len(self._lengths))
        work = Workload(len(self._lengths), mean, self._new_tokens)
        chunk_bytes = max(c.size_bytes for c in self._parts.engine.space.chunks)
        budget = Budget(self._capacity_bytes)
        return Problem(shape, rates, budget, work, chunk_bytes=chunk_bytes)

    def _compute(self, shape: Shape, config: Any, form: str | None, fitting: BlockPlan) -> Compute:
        """Kept, or measured now within the budget. Raises _NotSearchedError."""
        from offload.calibrate import cached_calibration, kept_calibration, sample_bytes

        machine = self._parts.machine
        assert machine is not None
        assert self._given.disk is not None
        asked = config, form, self._given.disk, machine
        kept = kept_calibration(*asked)
        if kept is not None:
            return kept
        passes = -(-len(self._lengths) // fitting.rows) * self._new_tokens
        reading_s = passes * self._away_bytes(fitting) / machine.read_bytes_per_s
        if reading_s < WORTH_S:
            raise _NotSearchedError("too short a run to measure for")
        needed_bytes = sample_bytes(config, form) + PROBE_BYTES
        needed_bytes += 512 * shape.rows.token_bytes
        return self._measured_within(needed_bytes, lambda: cached_calibration(*asked))

    def _measured_within(self, needed_bytes: int, measure: Callable[[], Compute]) -> Compute:
        """Raises _NotSearchedError where there is no room for it."""
        what, engine = "measuring how fast layers compute", self._parts.engine
        coming_bytes = engine.ledger.budget_bytes - engine.ledger.used_bytes
        if free_memory_bytes() - coming_bytes < SPARE_BYTES:
            raise _NotSearchedError(
                f"{what} would leave the system too little; `offload plan --task generate` does it "
                "beforehand"
            )
        try:
            engine.take_other(needed_bytes, what)
        except BudgetError:
            size = format_size(needed_bytes)
            raise _NotSearchedError(f"{what} would need {size}") from None
        try:
            with torch.random.fork_rng(devices=[]):  # the sample's weights are random
                return measure()
        except (DiskFull, SpillError) as error:
            raise _NotSearchedError(f"{what}: {error}") from None
        finally:
            engine.ledger.give_other(needed_bytes)
            vm.return_freed_memory()

    def _search(self, problem: Problem) -> Policy:
        from offload.prefetch.rehearse import rehearse  # scipy: only where something is searched
        from offload.prefetch.search import NothingFits, search

        least_bytes = least_frames_bytes(self._model, self._parts)

        def allowed(candidate: Candidate) -> bool:
            plan = BlockPlan(candidate.batch, candidate.micro_batches)
            block_bytes = self._cost.of(plan, self._lengths, self._new_tokens)
            block_bytes += self._cost.largest_result_bytes(plan, self._lengths)
            return block_bytes + least_bytes <= self._capacity_bytes

        try:
            policy = search(problem, allowed)
        except NothingFits as error:
            raise _NotSearchedError(f"the search finds no room ({error})") from None
        return rehearse(problem, policy)


class _NotSearchedError(Exception):
    """Why rows are as many as fit."""


def form_of(model: nn.Module) -> str | None:
    """The codes that weights of products are stored as: "int4" or "int8"; None: as they are."""
    forms = (m.form.name for m in model.modules() if isinstance(m, Quantised))
    return next(forms, None)


def kept_type(model: nn.Module) -> str:
    """The type of weights that are no codes, which is what is computed in."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return str(dtype).removeprefix("torch.")
