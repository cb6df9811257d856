"""What torch has no public name for: every use of its private names here, each with its reason.

Tried with torch 2.13. A name that a later torch no longer has fails here and nowhere else:
in a question, with the answer that costs time but no number; where there is none, with an
OffloadError; of the re-exported names, when ``offload`` is imported.

Re-exported: ``TorchDispatchMode``, which torch's manual names by this private path, and the tree
functions, by which torch's own transforms look into arguments (a tree of our own would not know
the containers that users register there).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

from offload.errors import OffloadError

__all__ = [
    "TorchDispatchMode", "backward_runs", "calls_are_watched", "compiled", "fake_mode",
    "in_transform", "quietly", "storage_lives", "tree_flatten", "tree_leaves", "tree_map",
    "tree_map_only", "tree_unflatten", "when_backward_ends",
]  # fmt: skip

_FAKES = "torch._subclasses.fake_tensor"


def calls_are_watched() -> bool:
    """Whether code of the user's may run beside every module's call or every operation.

    Modes over functions have a public question; hooks on all modules and modes over operations
    have none. Without them: True, for which chunks are checked before they are dropped.
    """
    if has_torch_function((None,)):
        return True
    hooks = getattr(nn.modules.module, "_has_any_global_hook", None)
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return hooks is None or modes is None or bool(hooks() or modes())


def in_transform() -> bool:
    """Whether ``torch.func.grad``, ``vmap`` or the like is at work.

    Without the question: False. Torch itself then refuses our saved-tensor hooks, in its words.
    """
    functorch = getattr(torch._C, "_functorch", None)
    innermost = getattr(functorch, "peek_interpreter_stack", None)
    return innermost is not None and innermost() is not None


def backward_runs() -> bool:
    """Whether this thread is inside a backward pass. Raises OffloadError where torch cannot tell.

    No guess would do: a weight that is read then belongs to a recomputation, and must be kept.
    """
    task = getattr(torch._C, "_current_graph_task_id", None)
    if task is None:
        raise _missing("torch._C._current_graph_task_id", "weights in frames")
    return bool(task() != -1)


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Have autograd call this at the end of the backward pass that runs, as FSDP2 and DDP do.

    Raises OffloadError where torch cannot; RuntimeError outside of a backward pass.
    """
    engine: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
    if not hasattr(engine, "queue_callback"):
        raise _missing(
            "torch.autograd.Variable._execution_engine.queue_callback", "weights in frames"
        )
    engine.queue_callback(callback)


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile is at work on the model, on a part of it, or on what calls it.

    ``Module.compile`` leaves only a private attribute. Raises OffloadError where there is none:
    a compiled graph that is not noticed would read frames at addresses of another moment.
    """
    if torch.compiler.is_compiling():
        return True
    if not hasattr(nn.Module, "_compiled_call_impl"):
        raise _missing("torch.nn.Module._compiled_call_impl", "weights in frames")
    if any(m._compiled_call_impl is not None for m in model.modules()):
        return True
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and "_dynamo" in code.co_filename:
            return True
        frame = frame.f_back
    return False


def storage_lives(tensor: Tensor) -> Callable[[], bool]:
    """Tells later whether any tensor or array over this tensor's memory is still alive.

    Torch shares storages between processes by such references. Without them: always True, for
    which weights stay where they are.
    """
    try:
        from torch.multiprocessing.reductions import StorageWeakRef
    except ImportError:
        return lambda: True
    reference: Any = StorageWeakRef(tensor.untyped_storage())
    return lambda: not reference.expired()


def fake_mode() -> Any:
    """A mode whose tensors have shapes but no data. Raises OffloadError where torch has none.

    Meta tensors are public but will not do: they are on no CPU, so models take other branches.
    """
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise _missing(f"{_FAKES}.FakeTensorMode", "offload plan") from error
    return FakeTensorMode()


@contextmanager
def quietly() -> Iterator[None]:
    """Without what torch logs of operations that fail on such tensors: failing is an answer."""
    logger = logging.getLogger(_FAKES)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _missing(name: str, what: str) -> OffloadError:
    return OffloadError(
        f"torch {torch.__version__} has no {name}, without which {what} cannot work; use torch "
        "2.13, or a newer offload"
    )
