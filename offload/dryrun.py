"""One step of a model without data: what it would touch, save and compute, event by event.

The forward and the backward pass run on fake tensors, with the signals that `Hooks` has on real
ones: a module that owns weights begins, autograd uses a saved weight, a gradient arrives. Between
two signals lies *work*: the operations, with their multiplications and the bytes they go through.
Where chunks are is not asked here (offload/synthesis.py), so one run serves every budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from offload.blueprint import Draft
from offload.cachename import cache_name
from offload.errors import OffloadError
from offload.gradients import shared_params
from offload.guard import allocates
from offload.internals import TorchDispatchMode, quietly, tree_leaves
from offload.saved import span_bytes

Span = tuple[str, int, int]  # parameter, elements [start, stop)


@dataclass(slots=True)
class Event:
    """``needs``: weights that must be there; or ``gradient``: the parameter whose gradient came.

    ``work``: (floating-point operations, bytes) of each operation that follows. ``other_bytes``:
    of saved activations and results, at most, until the next event. ``ends_forward``: a mark.
    ``lookup``: a table, of which a processor reads a few rows where they lie; frames hold it all.
    """

    backward: bool
    needs: tuple[Span, ...] = ()
    gradient: str | None = None
    other_bytes: int = 0
    work: list[tuple[float, float]] = field(default_factory=list)
    ends_forward: bool = False
    lookup: bool = False


@dataclass(slots=True)
class Step:
    """All events of a step. ``shared``: parameters that several modules hold.

    ``saved_bytes``: what autograd holds at most. ``largest_result_bytes``: of one operation of the
    forward pass.
    """

    events: list[Event]
    shared: frozenset[str]
    saved_bytes: int
    largest_result_bytes: int = 0

    @property
    def flops(self) -> float:
        """Floating-point operations of a step."""
        return sum(f for e in self.events for f, _ in e.work)


def dry_run(draft: Draft) -> Step:
    """Run one step of a draft. Raises OffloadError for models that compute depending on data."""
    watch = _Watch(draft.model)
    try:
        with quietly(), draft.mode, watch.on_modules(), watch:
            with torch.autograd.graph.saved_tensors_hooks(watch.pack, watch.unpack):
                loss = draft.model(**draft.inputs, **_without_cache(draft.model)).loss
            watch.note(Event(backward=False, ends_forward=True))
            watch.backward = True
            loss.backward()
            del loss
    except (RuntimeError, TypeError, NotImplementedError) as error:
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise OffloadError(
            f"plan: {type(draft.model).__name__} cannot be run without data ({line}); what it does "
            "depends on numbers, so only a recorded step can tell what it needs"
        ) from error
    finally:
        draft.model.zero_grad(set_to_none=True)
    names = {p: n for n, p in draft.model.named_parameters()}
    shared = frozenset(names[p] for p in shared_params(draft.model))
    return Step(watch.events, shared, watch.most_bytes, watch.largest_bytes)


def _without_cache(model: Any) -> dict[str, Any]:
    """Arguments with which a model keeps no cache and does not look into its positions.

    Without a cache, transformers looks at the numbers of the positions for packed sequences.
    """
    told: dict[str, Any] = {"use_cache": False}
    if not getattr(model.config, "is_encoder_decoder", False):
        told[cache_name(model.forward)] = _no_cache()
    return told


def _no_cache() -> Any:
    from transformers import DynamicCache

    class NoCache(DynamicCache):  # type: ignore[misc]
        """Hands keys and values through."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            return key_states, value_states

    return NoCache()


class _Kept:
    """What autograd holds in place of a saved tensor."""

    __slots__ = ("_release", "span", "tensor")

    def __init__(
        self, tensor: Tensor, span: Span | None, release: Callable[[], None] | None
    ) -> None:
        self.tensor, self.span, self._release = tensor.detach(), span, release

    def __del__(self) -> None:
        if self._release is not None:
            self._release()


class _Watch(TorchDispatchMode):
    """Writes the events down. Storages are told apart by identity, since they have no address."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.events = [Event(backward=False)]  # before the first signal
        self.backward = False
        self.most_bytes = 0
        self.largest_bytes = 0
        self._model = model
        self._names = {p: n for n, p in model.named_parameters()}
        self._weights = {id(p.untyped_storage()): (n, p.untyped_storage())
                         for p, n in self._names.items()}  # fmt: skip
        self._saved: dict[int, tuple[Any, int]] = {}  # storage, holders
        self._saved_bytes = 0

    def note(self, event: Event) -> None:
        """A signal."""
        self.events.append(event)
        self._see(0)

    @contextmanager
    def on_modules(self) -> Iterator[None]:
        """Signals from modules and gradients, for a while."""
        handles: list[Any] = []
        for module in self._model.modules():
            own = tuple((self._names[p], 0, p.numel()) for p in module.parameters(False))
            if own:
                enter = partial(self._enter, own, isinstance(module, nn.Embedding))
                handles.append(module.register_forward_pre_hook(enter))
        for param, name in self._names.items():
            if param.requires_grad:
                handles.append(param.register_hook(lambda _, n=name: self._arrives(n)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, spans: tuple[Span, ...], lookup: bool, *_: object) -> None:
        self.note(Event(self.backward, needs=spans, lookup=lookup))

    def _arrives(self, name: str) -> None:
        self.note(Event(backward=True, gradient=name))

    # -- operations -------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        grouped = "grouped_mm" in func.__name__
        result = _grouped(args) if grouped else func(*args, **kwargs)
        if func.namespace == "prim" or _is_view(func):
            return result
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        work = _flops(func, args, kwargs, result), float(_bytes(inputs) + _bytes(outputs))
        self.events[-1].work.append(work)
        if allocates(func) and not self.backward:
            result_bytes = sum(x.nbytes for x in outputs)
            if not grouped or outputs[0].dtype is torch.bfloat16:  # as `AllocationGuard` can tell
                self.largest_bytes = max(self.largest_bytes, result_bytes)
            self._see(result_bytes)
        return result

    def _see(self, more_bytes: int) -> None:
        last = self.events[-1]
        last.other_bytes = max(last.other_bytes, self._saved_bytes + more_bytes)

    # -- autograd ---------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> _Kept:
        """As `SavedTensors.pack`."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._weights:
            start = int(tensor.storage_offset())
            span = self._weights[key][0], start, start + span_bytes(tensor) // tensor.element_size()
            return _Kept(tensor, span, None)
        holders = self._saved.get(key, (storage, 0))[1]
        if not holders:
            self._saved_bytes += storage.nbytes()
            self.most_bytes = max(self.most_bytes, self._saved_bytes)
            self._see(0)
        self._saved[key] = (storage, holders + 1)
        return _Kept(tensor, None, lambda: self._let_go(key))

    def unpack(self, kept: _Kept) -> Tensor:
        """As `SavedTensors.unpack`."""
        if kept.span is not None:
            self.note(Event(backward=True, needs=(kept.span,)))
        return kept.tensor

    def _let_go(self, key: int) -> None:
        storage, holders = self._saved.pop(key)
        if holders > 1:
            self._saved[key] = (storage, holders - 1)
        else:
            self._saved_bytes -= storage.nbytes()


def _is_view(func: Any) -> bool:
    """Whether an operation neither makes nor changes anything."""
    schema = func._schema
    return not allocates(func) and not schema.is_mutable


def _bytes(tensors: list[Tensor]) -> int:
    """What going through them moves: an expanded tensor no more than its storage."""
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)


def _grouped(args: tuple[Any, ...]) -> Tensor:
    """Rows by one of several weights each, or the gradient of these: torch infers bfloat16 only.

    [rows, k] by [groups, k, n] -> [rows, n]; [m, rows] by [rows, n] -> [groups, m, n].
    """
    left, right, ends = args[:3]
    groups = () if right.dim() == 3 else (ends.shape[0],)
    result: Tensor = left.new_empty((*groups, left.shape[0], right.shape[-1]))
    return result


def _flops(func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> float:
    return float(_products(func, args, kwargs, result))


def _products(func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> Any:
    packet = func._overloadpacket
    name = func.__name__.partition(".")[0]
    if "flash_attention_for_cpu" in name:
        q, k = args[1:3] if name.endswith("backward") else args[:2]
        products = 10.0 if name.endswith("backward") else 4.0
        return products * float(q.numel()) * k.shape[-2]
    if "grouped_mm" in name:  # each row meets one group
        return 2.0 * args[0].numel() * args[1].shape[-1]
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    return 0
