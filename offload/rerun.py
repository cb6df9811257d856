"""Run a unit's forward once more in the backward pass, for what it saved (Chen et al. 2016).

As non-reentrant checkpointing does it: the hooks on saved tensors let everything go but weights,
and the first of them that autograd asks for runs the forward again, under the random state,
autocast settings and buffers of the first time, until the last that is still wanted is there.
Modules of the user are not changed. Random numbers of numpy are not restored.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from offload.errors import OffloadError
from offload.frozen import freeze, thaw
from offload.internals import tree_flatten, tree_unflatten
from offload.prefetch.policy import Part
from offload.results import Again, Results, Stopwatch, handling_s
from offload.saved import STALE, Packed, Saved, Visitor
from offload.site import Saving, Site


class _Enough(BaseException):
    """All that is wanted is there. Not an Exception: the user's forward must not catch it."""


class Dropped:
    """What autograd holds in place of a tensor that a rerun can make again."""

    __slots__ = ("__weakref__", "dtype", "index", "rerun", "shape", "visit")

    def __init__(self, rerun: Rerun, tensor: Tensor, visit: Visitor | None) -> None:
        self.visit = visit
        self.rerun = rerun
        self.index = rerun.note(self)
        self.shape = tensor.shape
        self.dtype = tensor.dtype

    def __del__(self) -> None:
        self.rerun.forget(self.index)

    def check(self) -> Tensor:
        """The tensor, made again where it is not there."""
        return self.rerun.get(self.index)


@dataclass(slots=True)
class Seen:
    """What was measured of one run of a unit. ``saved_bytes`` None: not known yet.

    ``clock``: seconds without waiting for transfers, where its rerun is to be timed;
    ``rerun_s`` and ``parts`` (operations of it) then follow, and ``handling_s``, by which a mode
    around its operations lengthens a run.
    """

    name: str
    forward_s: float = 0.0
    saved_bytes: int | None = None
    boundary_bytes: int = 0
    recomputable: bool = True
    clock: Callable[[], float] | None = None
    rerun_s: float | None = None
    parts: tuple[Part, ...] = ()
    handling_s: float = 0.0


@dataclass(slots=True)
class _Input:
    """An argument that is a tensor: held, and handed to the rerun as a leaf."""

    packed: Packed
    requires_grad: bool

    def again(self, saved: Saving) -> Tensor:
        return saved.unpack(self.packed).detach().requires_grad_(self.requires_grad)


class _Arguments:
    """What a unit was given, held for its rerun."""

    def __init__(self, arguments: object, site: Site) -> None:
        leaves, self._spec = tree_flatten(arguments)
        self._saved = site.saved
        self._leaves: list[object] = []
        for x in leaves:
            if isinstance(x, Tensor):
                held = site.saved.weight(x) or Saved(x, (), site.activations)
                self._leaves.append(_Input(held, x.requires_grad))
            else:
                self._leaves.append(freeze(x))

    def again(self) -> Any:
        """The positional and the named ones, to be used once."""
        leaves = [x.again(self._saved) if isinstance(x, _Input) else thaw(x) for x in self._leaves]
        return tree_unflatten(leaves, self._spec)

    def addresses(self) -> set[int]:
        """Where the tensors' storages are."""
        held = [x.packed for x in self._leaves if isinstance(x, _Input)]
        return {x.check().untyped_storage().data_ptr() for x in held if isinstance(x, Saved)}


class Around:
    """What a forward pass reads beside its arguments: random state, autocast, buffers, weights.

    Of ``place``, where it computes, and of the host.
    """

    def __init__(self, unit: nn.Module, place: torch.device) -> None:
        self._place = place
        self._rng = _random_state(place)
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", place.type}
        }
        self._casts_cached = torch.is_autocast_cache_enabled()
        # By value: batch norm writes its statistics without counting a version.
        self._buffers = [(b, b.detach().clone()) for b in unit.buffers()]
        self._weights = [(p, p._version) for p in unit.parameters()]
        self._lent = frozenset(b.untyped_storage().data_ptr() for b in unit.buffers())

    def lends(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in a buffer, whose value is another when the rerun is over."""
        return tensor.untyped_storage().data_ptr() in self._lent

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same for a while. Raises as torch does when a weight was written to since."""
        for param, then in self._weights:
            if param._version != then:
                raise RuntimeError(
                    STALE.format(shape=list(param.shape), now=param._version, then=then)
                )
        now = _random_state(self._place)
        present = [(b, b.detach().clone()) for b, _ in self._buffers]
        try:
            _put(self._buffers)
            _set_random_state(self._rng, self._place)
            with ExitStack() as stack:
                stack.enter_context(torch.enable_grad())
                for kind, (on, dtype) in self._autocast.items():
                    cached = self._casts_cached
                    stack.enter_context(torch.autocast(kind, dtype, on, cached))
                yield
        finally:
            _set_random_state(now, self._place)
            _put(present)


def _random_state(place: torch.device) -> tuple[Any, ...]:
    """Of torch's generators on the host and on this device, and of Python's."""
    device = torch.cuda.get_rng_state(place) if place.type == "cuda" else None
    return torch.get_rng_state(), device, random.getstate()


def _set_random_state(state: tuple[Any, ...], place: torch.device) -> None:
    host, device, python = state
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device, place)
    random.setstate(python)


def _put(values: list[tuple[Tensor, Tensor]]) -> None:
    """Give buffers these values; those that have them are not written to."""
    with torch.no_grad():
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


class Rerun:
    """One visit of a unit whose forward can run again. Weights are never dropped."""

    def __init__(self, unit: nn.Module, seen: Seen, arguments: object, site: Site) -> None:
        self._unit = unit
        self._seen = seen
        self._site = site
        self._arguments = _Arguments(arguments, site)
        self._around = Around(unit, site.place)
        self._dropped: list[weakref.ref[Dropped]] = []
        self._made: dict[int, Saved] = {}
        self.results = Results(site.activations)

    def note(self, dropped: Dropped) -> int:
        """One more tensor is dropped; its place in the order."""
        self._dropped.append(weakref.ref(dropped))
        return len(self._dropped) - 1

    def forget(self, index: int) -> None:
        """Autograd has let go of it."""
        self._made.pop(index, None)

    def clear(self) -> None:
        """Let go of what was made and not used: backward has gone on to another unit."""
        self._made.clear()

    def get(self, index: int) -> Tensor:
        """A dropped tensor; its debit ends here, a node uses it only briefly."""
        if index not in self._made:
            self._run()
        tensor = self._made.pop(index).tensor
        assert tensor is not None
        return tensor

    def _made_bytes(self) -> int:
        """What the tensors that are there hold beyond the unit's inputs."""
        inputs = self._arguments.addresses()
        sizes = {}
        for saved in self._made.values():
            if saved.tensor is not None:
                storage = saved.tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        return sum(size for at, size in sizes.items() if at not in inputs)

    def _run(self) -> None:
        wanted = {i for i, ref in enumerate(self._dropped) if ref() is not None}
        last, seen = max(wanted), 0

        def pack(tensor: Tensor) -> Tensor | Packed:
            nonlocal seen
            weight = self._site.saved.weight(tensor)
            if weight is not None:
                return weight
            if seen in wanted:
                self._keep(seen, tensor)
            if seen == last:
                raise _Enough
            seen += 1
            return tensor.detach()

        def unpack(held: Tensor | Packed) -> Tensor:  # where a forward takes gradients itself
            return held if isinstance(held, Tensor) else self._site.saved.unpack(held)

        args, kwargs = self._arguments.again()
        with self._around.again(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            try:
                with self._site.again(self._unit), self._measured():
                    self._unit.forward(*args, **kwargs)
            except _Enough:
                self.results.clear()
                if self._seen.saved_bytes is None:
                    self._seen.saved_bytes = self._made_bytes()
                return
        raise self._differs(f"saved {seen} tensors, not {len(self._dropped)}")

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Around the forward: timed where that is wanted, else without what was kept of it."""
        clock = self._seen.clock if self._seen.saved_bytes is None else None
        mine = self._site.computing
        mode: AbstractContextManager[Any] = (
            Again(self.results, mine) if self.results else nullcontext()
        )
        watch = Stopwatch(clock, mine) if clock is not None else None
        began_s = clock() if clock is not None else 0.0
        try:
            with watch or mode:
                yield
        finally:
            if watch is not None and clock is not None:
                took_s = clock() - began_s
                self._seen.handling_s = watch.calls * handling_s()
                self._seen.rerun_s = max(took_s - self._seen.handling_s, 0.0)
                self._seen.parts = tuple(watch.parts)

    def _keep(self, index: int, tensor: Tensor) -> None:
        dropped = self._dropped[index]()
        if dropped is None:
            return
        if tensor.shape != dropped.shape or tensor.dtype != dropped.dtype:
            raise self._differs(
                f"saved a tensor of shape {list(tensor.shape)} and {tensor.dtype} where it had "
                f"saved one of shape {list(dropped.shape)} and {dropped.dtype}"
            )
        own = tensor.clone() if self._around.lends(tensor) else tensor
        self._made[index] = Saved(own, (), self._site.activations)

    def _differs(self, how: str) -> OffloadError:
        return OffloadError(
            f"{self._seen.name}: its forward pass, run again for the backward pass, {how}. It "
            'depends on more than its arguments; give offload.wrap activations="keep" or "swap"'
        )
