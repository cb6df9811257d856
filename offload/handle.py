"""Which run manages a model, and how one with an optimizer takes over from one without."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from offload.config import Given
from offload.errors import OffloadError
from offload.run import Runtime


class Handle:
    """Ties a runtime to its model; a copy of the model does not carry it."""

    def __init__(self, runtime: Runtime | None = None) -> None:
        self.runtime = runtime

    def __deepcopy__(self, memo: object) -> Handle:
        return Handle()

    def __reduce__(self) -> tuple[Any, ...]:
        return Handle, ()


def runtime(model: nn.Module) -> Runtime:
    """The run that manages this model. Raises OffloadError when none does."""
    run = _run_of(model)
    if run is None:
        raise OffloadError("this model is not managed: call offload.wrap(model, optimizer) first")
    return run


def taken_over(model: nn.Module, optimizer: Optimizer | None, told: list[str]) -> Given | None:
    """End a run that has no optimizer yet, so that one with an optimizer takes its place.

    Adapters may have been put around the model that is managed, as peft does.
    """
    runs = [run for part in model.modules() if (run := _run_of(part)) is not None]
    if not runs:
        return None
    before = runs[0]
    again = optimizer is None and before.model is model
    if len(runs) > 1 or before.optimizer is not None or again:
        raise OffloadError(
            "this model, or one within it, is managed already: offload.runtime(model).close() first"
        )
    if told:
        raise OffloadError(
            f"this model keeps the budgets that it was made with: leave {', '.join(told)} out of "
            "wrap(); offload.init() and offload.from_pretrained() take them"
        )
    before.bring_home()
    before.parts.engine.evict_all()
    before.close()
    return before.given


def _run_of(model: nn.Module) -> Runtime | None:
    """The run that manages this very module; a copy of a managed model has none."""
    handle = model.__dict__.get("_offload")
    return handle.runtime if isinstance(handle, Handle) else None
