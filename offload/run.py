"""The face of a run: what it did, what it plans, and how to end it."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from offload.block import BlockStep, Row
from offload.blockcaches import KVAsked
from offload.config import Given, Size
from offload.errors import OffloadError
from offload.homing import release_all
from offload.ledger import Ledger
from offload.limits import limit_of, limit_of_form
from offload.parts import Parts
from offload.places import BlockPlan
from offload.prefetch.bounds import Limit
from offload.prefetch.plan import Plan
from offload.rowchoice import RowChoice
from offload.sampling import Sampling
from offload.steps import Kind
from offload.throughput import Asked, Prompt, generate
from offload.tiers.lane import Meter
from offload.tiers.spec import parse_size
from offload.vertical import Accumulator

B = TypeVar("B")


class Runtime:
    """Returned by ``offload.runtime(model)``. Also a context manager that closes the run."""

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, parts: Parts, given: Given
    ) -> None:
        self.given = given
        self.model = model
        self.optimizer = optimizer
        self.parts = parts
        self.rows: RowChoice | None = None  # of the last `generate`
        self._accumulator = Accumulator(model, parts)

    @property
    def plan(self) -> Plan | None:
        """The plan that training (else inference) steps follow, once one was recorded."""
        for kind in Kind:
            follower = self.parts.steps.tracks[kind].follower
            if follower is not None:
                return follower.plan
        return None

    @property
    def state_dtype(self) -> str | None:
        """What ``wrap`` was told of optimizer state; None: as the optimizer keeps it."""
        stepper = self.parts.stepper
        return stepper.narrowing.state_dtype if stepper is not None else None

    def stats(self) -> dict[str, Any]:
        """What happened so far; see docs/stats.md for every key and its unit."""
        engine, steps = self.parts.engine, self.parts.steps
        kind = Kind.TRAIN if steps.tracks[Kind.TRAIN].steps else Kind.INFER
        plan, limit = self.plan, limit_of(self.parts, kind)
        space, device = engine.space, self.parts.device
        return {
            "steps": steps.tracks[kind].steps,
            "step_s": steps.median_s(kind),
            **(limit._asdict() if limit is not None else dict.fromkeys(Limit._fields)),
            "forecast": asdict(plan.forecast) if plan else None,
            "step_bytes": {
                name: statistics.median(moved) if moved else None
                for name, moved in steps.tracks[kind].replayed_bytes.items()
            },
            "lanes": {name: _lane_stats(lane.meter) for name, lane in space.lanes.items()},
            "tiers": {
                "host": _host_stats(engine.ledger),
                "disk": {"used_bytes": space.disk.used_bytes if space.disk else 0},
                **({"device": device.tier_stats()} if device is not None else {}),
            },
            "device": device.stats(kind) if device is not None else None,
            "forms": {
                name: track.stats() | {"bound_s": limit.bound_s if limit is not None else None}
                for name, track in steps.forms.items()
                for limit in (limit_of_form(self.parts, name),)
            },
            "activations": self.parts.hooks.activations.stats()
            if self.parts.hooks is not None
            else None,
            "kv": self.parts.kv.stats() if self.parts.kv is not None else None,
            "generate": self.rows.to_dict() if self.rows is not None else None,
            "temporaries_bytes": steps.watch.excess_bytes,
            "stall_s": dict(engine.counters.stall_s),
            "counters": {
                "demand_loads": engine.counters.demand_loads,
                "planned_loads": engine.counters.planned_loads,
                "evictions": engine.counters.evictions,
                "forced_evictions": engine.counters.forced_evictions,
            },
        }

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        task: str = "",
        history: Mapping[str, Sequence[float | None]] | None = None,
    ) -> None:
        """Write what the last planned step did: where memory and time went, and what would help.

        ``path`` ends in ``.html`` (a page that needs nothing else), ``.json`` (its data, see
        docs/report-schema.md) or ``.trace.json`` (for ui.perfetto.dev). The first step of a run is
        watched and the second follows a first plan: a report after five steps shows steady ones.
        Making the advice plans the step anew a few times, which takes seconds for very large
        models. ``task``: what to call it, without: "train" or "generate". ``history``: columns
        ``step``, ``loss``, ``step_s``, ``tokens_per_s`` of a loop that kept them; without, the
        seconds of planned steps. Raises OffloadError for another ending.
        """
        from offload.report import write_report

        write_report(self, Path(path), task, history)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Backward passes in here are not the last of their step (for ``step_in_backward``).

        Gradients add up as usual; the first backward pass after it updates. Without
        ``step_in_backward`` it changes nothing.
        """
        with self.parts.early.paused() if self.parts.early is not None else nullcontext():
            yield

    def accumulate(
        self, micro_batches: Iterable[B], loss_fn: Callable[[nn.Module, B], Tensor]
    ) -> list[Tensor]:
        """Gradients of several micro-batches for the weight traffic of one; losses, detached.

        The bits are those of ``for mb in micro_batches: loss_fn(model, mb).backward()``, all
        within one step. See ``offload.vertical``.
        """
        return self._accumulator(micro_batches, loss_fn)

    def kv_cache(
        self,
        *,
        memory: Size | None = None,
        kv_dtype: str | None = None,
        block_tokens: int | None = None,
        caches: int = 1,
        attention: str = "auto",
    ) -> Any:
        """``past_key_values`` within the budgets, for ``model.generate`` or the model's forward.

        Histories live in memory and on disk, are read one layer ahead, and are written once, block
        by block, as they grow; the numbers are those of ``DynamicCache``. ``memory`` bounds the
        caches of this run together (default: what weights leave of ``host_memory``, at least half
        of it). ``kv_dtype`` "int4" or "int2": finished blocks are coded (offload/kivi.py): other
        numbers, the same for every budget; ``stats()`` of the cache has the error.
        ``block_tokens``: tokens per block (default: chosen); ``caches``: how many will be open at
        once. Call the cache's ``close()`` when done with it. See `offload.kv.ManagedCache`.
        ``attention`` (with a device): of a few new tokens to keys and values on the host is
        computed on the "host", on the "device", to which they are then copied, or ("auto") where
        measured rates say; see docs/tuning.md.

        Raises OffloadError for what it cannot do; using it raises BudgetError, SpillError.
        """
        from offload.kv import Wanted, new_cache
        from offload.kvopen import store_of

        config = getattr(self.model, "config", None)
        if not hasattr(config, "get_text_config"):
            raise OffloadError("kv_cache() is for models of transformers, which have a config")
        wanted = Wanted(kv_dtype, block_tokens, caches, attention)
        memory_bytes = None if memory is None else parse_size(memory)
        store = store_of(self.model, self.parts, self.given, memory_bytes)
        return new_cache(config, store, wanted)

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        *,
        tokenizer: Any = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        plan: BlockPlan | None = None,
        kv_memory: Size | None = None,
        kv_dtype: str | None = None,
        attention: str = "auto",
        on_step: Callable[[BlockStep], None] | None = None,
    ) -> list[Row]:
        """Go on with many prompts, for throughput: weights move once a step for all rows.

        ``prompts``: token ids, or text with ``tokenizer``; of any lengths. Rows come back in their
        order, greedy unless ``sampling`` says otherwise; each ends by itself, at an end token of
        the model's ``generation_config``, a ``stop`` string, or its length. ``plan``: how many
        rows at once; without it what the policy search says of measured rates (as ``offload plan``,
        whose measurement is used; a run long enough makes it, in some ten seconds), or as many as
        fit: ``stats()["generate"]`` says which and why. ``kv_memory``: keys and values of all rows
        live in so much memory and on disk, as in ``kv_cache``, instead of whole in memory;
        ``kv_dtype`` "int4" or "int2" codes them (other numbers), in half of what weights leave
        where no ``kv_memory`` is given; ``attention`` as in ``kv_cache``. ``on_step`` is told of
        every step, with the rows that ended in it. See ``offload.block``. A row's tokens are those
        of ``model.generate`` up to the rounding of products of more rows; of an encoder-decoder
        those that its decoder adds.

        Raises OffloadError for models with a recurrent state, and for prompts without a token or
        longer than the model; BudgetError, in advance, for a block that does not fit or where not
        one row does; ValueError for settings out of range.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        kv = KVAsked(kv_memory, kv_dtype, attention)
        asked = Asked(max_new_tokens, sampling or Sampling(), stops, plan, kv)
        return generate(self, prompts, asked, tokenizer, on_step)

    def save(
        self,
        path: str | os.PathLike[str],
        scheduler: Any = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint directory, whole or not at all. See ``offload.checkpoint.save``."""
        from offload.checkpoint import save

        if self.parts.early is not None:
            self.parts.early.refuse_between_steps("save()")
        save(self, path, scheduler=scheduler, extra=extra)

    def load(self, path: str | os.PathLike[str], scheduler: Any = None) -> dict[str, Any]:
        """Go on from a checkpoint; returns its ``extra``. See ``offload.checkpoint.load``."""
        from offload.checkpoint import load

        if self.parts.early is not None:
            self.parts.early.reset()
        self.bring_home()  # they may come again, once a step was recorded
        return load(self, path, scheduler=scheduler)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write a directory for plain ``from_pretrained``. See ``offload.export.export``."""
        from offload.export import export

        export(self, path)

    def unwrap(self) -> tuple[nn.Module, Optimizer | None]:
        """Plain tensors again, in plain memory (all of it must fit); the run is closed.

        Optimizer state has the optimizer's own dtypes again, whatever ``state_dtype`` was.
        """
        if self.parts.stepper is not None:
            self.parts.stepper.widen_state()
        self.bring_home()
        self._detach()
        release_all(self.parts.binding)
        if self.optimizer is not None:
            for entries in self.optimizer.state.values():
                for name, value in entries.items():
                    if hasattr(value, "clone"):
                        entries[name] = value.clone()
        self.close()
        return self.model, self.optimizer

    def close(self) -> None:
        """Stop the workers and close the spill file; parameters stay readable where they are."""
        if self.parts.kv is not None:
            self.parts.kv.close()
        self.bring_home()
        self._detach()
        self.model.__dict__.pop("_offload", None)
        try:
            self.parts.engine.give_up_loads()
        finally:
            self.parts.spins.want(False)
            self.parts.engine.space.close()

    def bring_home(self) -> None:
        """Weights that live on the device are on the host again."""
        device = self.parts.device
        if device is not None and device.residents is not None:
            device.residents.give_up_all()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def _detach(self) -> None:
        self.parts.steps.watch.stop()
        if self.parts.hooks is not None:
            self.parts.hooks.remove()
            self.parts.hooks = None
        if self.parts.stepper is not None:
            self.parts.stepper.close()
            self.parts.stepper = None
        while self.parts.handles:
            self.parts.handles.pop().remove()


def _lane_stats(meter: Meter) -> dict[str, Any]:
    rate = meter.moved_bytes / meter.busy_s if meter.busy_s else None
    return {
        "bytes": meter.moved_bytes, "transfers": meter.transfers, "busy_s": meter.busy_s,
        "bytes_per_s": rate,
    }  # fmt: skip


def _host_stats(ledger: Ledger) -> dict[str, int]:
    return {
        "budget_bytes": ledger.budget_bytes, "used_bytes": ledger.used_bytes,
        "peak_bytes": ledger.peak_bytes, "peak_other_bytes": ledger.peak_other_bytes,
    }  # fmt: skip
