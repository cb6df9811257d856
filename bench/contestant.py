"""One of our own contestants: plain torch, or offload with a budget. See child.py for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from child import SHAPES, arguments, build, say, serve
from rivals import BOUNDS

import offload
from offload.errors import BudgetError
from offload.prefetch.bounds import bound, drive_of
from offload.prefetch.simulate import Replay
from offload.prefetch.uses import find_uses
from offload.run import Runtime
from offload.tiers.spec import Machine
from offload.vectormath import settle

Step = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS = ("auto", "recompute", "swap")  # contestants that are named after this setting


def stepper(model: Any, optimizer: Any) -> Step:
    """The user's plain loop."""

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def plain(shape_name: str, *, checkpointing: bool = False) -> Step:
    """Everything in memory, no offload."""
    model = build(SHAPES[shape_name]).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return stepper(model, torch.optim.AdamW(model.parameters(), fused=True))


def managed(args: Any, budget: str | int, held: list[Any]) -> Step:
    """Three lines of offload in the same loop; the model is never whole in memory."""
    model = offload.init(
        lambda: build(SHAPES[args.shape]), host_memory=budget, disk=args.disk
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model, optimizer = offload.wrap(
        model, optimizer, step_in_backward=args.kind == "offload-backward",
        activations=args.kind if args.kind in ACTIVATIONS else "keep",
    )  # fmt: skip
    held[:] = [model]
    return stepper(model, optimizer)


def anew(run: Runtime) -> dict[str, float | None]:
    """Bounds and forecast of the run's plan with its machine's rates of now."""
    track, machine = run.parts.steps.tracks["train"], run.parts.machine
    known = {key: run.stats()[key] for key in BOUNDS}
    if track.follower is None or track.trace is None or machine is None:
        return {**known, "foretold_s": None}
    plan, capacity_bytes = track.follower.plan, run.parts.engine.ledger.capacity_bytes
    forecast = plan.forecast
    if not forecast.moved_bytes:
        return {**known, "foretold_s": forecast.step_s}  # the disk has no part in it
    moved = forecast.phase_read_bytes, forecast.phase_write_bytes
    limit = bound(drive_of(machine, *moved, plan.reserve_bytes), track.trace)
    replay = Replay(track.trace, machine, capacity_bytes, find_uses(track.trace))
    return {
        "bound_s": limit.bound_s, "wire_bound_s": limit.wire_bound_s,
        "foretold_s": replay.run(plan.ops, plan.resident_at_start).step_s,
    }  # fmt: skip


def least_bytes(args: Any) -> int:
    """The smallest budget with which three steps run, by asking until none is refused."""
    budget, held = 1 << 20, []
    while True:
        try:
            step = managed(args, budget, held)
            for _ in range(3):
                step(torch.zeros((1, args.tokens), dtype=torch.int64))
            return budget
        except BudgetError as refused:
            if held:
                offload.runtime(held[0]).close()
            budget = max(refused.smallest_bytes or 0, budget + (8 << 20))


def main() -> None:
    kinds = ("plain", "checkpointing", "offload", "offload-backward", "least", *ACTIVATIONS)
    args = arguments(kinds)
    settle()  # plain torch has the bits of the others then
    held: list[Any] = []
    if args.kind == "least":
        say(least_bytes=least_bytes(args))
    elif args.kind in ("plain", "checkpointing"):
        serve(lambda: plain(args.shape, checkpointing=args.kind == "checkpointing"), args)
    else:
        now: dict[str, float | None] = {}

        def measured(rates: dict[str, float]) -> None:
            """Bounds are of this minute from now on; plans stay."""
            run = offload.runtime(held[0])
            run.parts.machine = Machine(**rates)
            now.update(anew(run))

        serve(
            lambda: managed(args, args.budget, held), args,
            lambda: offload.runtime(held[0]).stats() | now, measured,
        )  # fmt: skip


if __name__ == "__main__":
    main()
