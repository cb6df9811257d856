"""Who calls: the module call that runs our hook, and transforms that cannot be served."""

from __future__ import annotations

import inspect
from types import FrameType

from torch import nn

from offload.errors import OffloadError
from offload.internals import in_transform

_MODULE_FILE = nn.Module.__call__.__code__.co_filename


def caller_of_hooks() -> FrameType | None:
    """The frame of the module call that is running our pre-hook."""
    frame = inspect.currentframe()
    for _ in range(4):  # this function, the method, Hook.__call__
        frame = frame.f_back if frame is not None else None
        if frame is not None and frame.f_code.co_filename == _MODULE_FILE:
            return frame
    return None


def refuse_transforms() -> None:
    """Raise OffloadError within ``torch.func.grad``, ``vmap`` and the like.

    They forbid saved-tensor hooks, by which we know of the backward pass.
    """
    if in_transform():
        raise OffloadError(
            "a managed model cannot be called within torch.func transforms (grad, vjp, jacrev, "
            "vmap, ...): they forbid the hooks by which weights are fetched. Use torch.autograd, "
            "or offload.runtime(model).unwrap() first, which needs memory for the whole model"
        )
