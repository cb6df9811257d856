"""Binding: which parameter lives in which chunks, and tensors over those homes."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from offload.errors import OffloadError
from offload.optim.codecs import Part
from offload.optim.mirror import OptimizerProfile
from offload.optim.narrow import Narrowing
from offload.tiers import vm
from offload.tiers.home import HomeSpace, Region
from offload.tiers.layout import (
    Layout,
    align_elements,
    choose_chunk_bytes,
    lay_out,
    page_elements,
)


def tensor_at(
    region: Region,
    tensor: int,
    like: Tensor,
    dtype: torch.dtype | None = None,
    seen: list[weakref.ref[Any]] | None = None,
) -> Tensor:
    """A tensor over a home, with ``like``'s shape and (where dense) strides.

    Each call gives a storage of its own, so that saving one tensor saves only its bytes. The
    storage keeps the region's mapping alive. ``seen`` receives a weak reference that dies with
    the storage, whatever views or arrays share it.
    """
    dtype = dtype or like.dtype
    numel = like.numel()
    if numel == 0:
        return torch.empty(like.shape, dtype=dtype)
    buffer = vm.buffer_at(region.address_of(tensor), numel * dtype.itemsize)
    buffer.mapping = region.mapping  # type: ignore[attr-defined]
    if seen is not None:
        seen.append(weakref.ref(buffer))
    flat = torch.frombuffer(buffer, dtype=dtype, count=numel)
    return torch.as_strided(flat, like.shape, dense_strides(like)).detach()


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides where it is a dense permutation (channels last), else contiguous."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]))
    expected = 1
    for d in order:
        if tensor.shape[d] != 1 and tensor.stride(d) != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= tensor.shape[d]
    return tuple(tensor.stride())


@dataclass(slots=True, eq=False)
class Family:
    """Parameters of one dtype that are all trained, or all not, laid out in one run.

    ``states[name]`` mirrors the run for one optimizer state tensor: same-shaped, or a value
    for each block of elements.
    """

    names: list[str]
    params: list[nn.Parameter]
    trained: bool
    layout: Layout
    weights: Region
    grads: Region | None = None
    states: dict[str, Region] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Home:
    """One parameter's place.

    ``grad`` is the gradient tensor over its home and ``grad_storage`` its memory, while alive:
    the user may keep the tensor, a view or a numpy array of it beyond ``zero_grad``.
    """

    name: str
    param: nn.Parameter
    family: Family
    index: int
    weight_chunks: tuple[int, ...]
    grad_chunks: tuple[int, ...]
    grad: weakref.ref[Tensor] | None = None
    grad_storage: weakref.ref[Any] | None = None

    @property
    def address(self) -> int:
        """Where the parameter's elements are."""
        return self.family.weights.address_of(self.index)

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return self.family.layout.numels[self.index] * self.family.weights.itemsize

    @property
    def grad_is_home(self) -> bool:
        """Whether ``param.grad`` is the tensor over our home."""
        return (
            self.grad is not None and self.param.grad is not None
            and self.grad() is self.param.grad
        )  # fmt: skip

    @property
    def grad_is_held(self) -> bool:
        """Whether anybody can still read the home: its chunks are worth keeping."""
        return self.grad_storage is not None and self.grad_storage() is not None

    def takes(self, grad: Tensor) -> bool:
        """Whether a first gradient, as it is, could be written to the home: nobody has that."""
        param, region = self.param, self.family.grads
        return (
            region is not None and param.grad is None and not self.grad_is_held
            and param.data_ptr() == self.address and param.numel() > 0
            and grad.dtype == param.dtype and param.is_contiguous()
        )  # fmt: skip

    def has_come(self, grad: Tensor | None) -> bool:
        """Whether this gradient was written to the home: it is known as the home's from now."""
        region = self.family.grads
        if grad is None or region is None or not self.grad_is_held:
            return False
        if grad.data_ptr() != region.address_of(self.index) or grad.shape != self.param.shape:
            return False
        self.grad = weakref.ref(grad)
        return True

    def state(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor over the home of one state; None where it has none of that shape and size."""
        region = self.family.states.get(name)
        if region is None or region.itemsize != dtype.itemsize:
            return None
        if region.layout is self.family.layout:
            return tensor_at(region, self.index, self.param, dtype) if (
                tuple(shape) == tuple(self.param.shape)
            ) else None  # fmt: skip
        if tuple(shape) != (region.layout.numels[self.index],):
            return None
        return tensor_at(region, self.index, torch.empty(shape, device="meta"), dtype)

    def new_grad(self) -> Tensor:
        """A fresh gradient tensor over the home."""
        assert self.family.grads is not None
        seen: list[weakref.ref[Any]] = []
        grad = tensor_at(self.family.grads, self.index, self.param, seen=seen)
        self.grad = weakref.ref(grad)
        self.grad_storage = seen[0] if seen else None
        return grad


class Binding:
    """All families of a model, and the way from a parameter or a chunk to its home."""

    def __init__(self, families: Iterable[Family]) -> None:
        self.families = list(families)
        self.homes: dict[nn.Parameter, Home] = {}
        self.away: set[str] = set()  # names whose data was seen to be elsewhere
        self.residents: set[nn.Parameter] = set()  # that live on the device; see note_residents
        self.stale: frozenset[int] = frozenset()  # chunks of nothing else: contents are rubbish
        self._grad_owners: dict[int, list[Home]] = {}
        for family in self.families:
            for i, (name, param) in enumerate(zip(family.names, family.params, strict=True)):
                grads = family.grads.chunks_of(i) if family.grads is not None else ()
                home = Home(name, param, family, i, family.weights.chunks_of(i), grads)
                self.homes[param] = home
                for chunk in grads:
                    self._grad_owners.setdefault(chunk, []).append(home)

    def is_dead(self, chunk: int) -> bool:
        """A gradient chunk that no living tensor refers to; a chunk of what lives on the device."""
        owners = self._grad_owners.get(chunk)
        if owners is None:
            return chunk in self.stale
        return not any(h.grad_is_held for h in owners)

    def note_residents(self) -> None:
        """`residents` was changed: find the chunks of weights and state that hold only theirs."""
        mixed: set[int] = set()
        whole: set[int] = set()
        for home in self.homes.values() if self.residents else ():
            regions = (home.family.weights, *home.family.states.values())
            chunks = whole if home.param in self.residents else mixed
            chunks.update(c for region in regions for c in region.chunks_of(home.index))
        self.stale = frozenset(whole - mixed)


def family_keys(
    model: nn.Module, trained: set[nn.Parameter], units: Iterable[str]
) -> dict[tuple[torch.dtype, bool, bool], list[tuple[str, nn.Parameter]]]:
    """Parameters by (dtype, trained, contiguous), in `storage_order`, tied ones once."""
    keys: dict[tuple[torch.dtype, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, param in storage_order(model, units):
        key = (param.dtype, param in trained, param.is_contiguous())
        keys.setdefault(key, []).append((name, param))
    return keys


def storage_order(model: nn.Module, units: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    """Parameters as registered, but within each unit (by name) the vectors before the matrices.

    Many models register the norms of a block behind its matrices, and compute with the first of
    them before all else: its gradient is the block's last. Behind the matrices it would have the
    end of this block and the begin of the next wait, since they share its chunk.
    """
    home = {
        f"{unit}.{name}": unit for unit in units
        for name, _ in model.get_submodule(unit).named_parameters()
    }  # fmt: skip
    named = list(model.named_parameters())
    place: dict[str, int] = {}
    for i, (name, _) in enumerate(named):
        place.setdefault(home.get(name, name), i)

    def order(item: tuple[str, nn.Parameter]) -> tuple[int, bool]:
        name, param = item
        return place[home.get(name, name)], name in home and param.dim() > 1

    return sorted(named, key=order)


def refuse_odd_parameters(model: nn.Module) -> None:
    """Refuse by name what cannot be homed: parameters without a shape, or over shared memory.

    Tied weights are one Parameter under two names, and fine; two Parameters would come apart.
    """
    for name, param in model.named_parameters():
        if isinstance(param, UninitializedParameter):
            raise OffloadError(f"{name} has no shape yet: run the model once before offload.wrap")
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in model.named_parameters()
        if p.numel()
    )
    for (_, end, first), (start, _, second) in pairwise(spans):
        if start < end:
            raise OffloadError(
                f"{first} and {second} are two Parameters over the same memory; tie them by "
                "assigning the same Parameter object to both"
            )


def choose_chunks(
    host_bytes: int, learnt: OptimizerProfile | None, narrowing: Narrowing
) -> tuple[int, int]:
    """(chunk bytes for a budget, chunks that an update needs at once), by what is trained."""
    trained = {p for p in learnt.params if p.requires_grad} if learnt is not None else set()
    copies = 2 + max((narrowing.copies(learnt, p) for p in trained), default=0)
    # Without an update, moments need whole weights: finer chunks round these up by less.
    return choose_chunk_bytes(host_bytes // (1 if learnt is not None else 2), copies), copies


def mirrors_of(
    named: list[tuple[str, nn.Parameter]], learnt: OptimizerProfile | None, narrowing: Narrowing
) -> dict[str, Part]:
    """Optimizer state that mirrors any of these parameters, by name."""
    return {k: v for _, p in named for k, v in narrowing.mirrors(learnt, p).items()}


def lay_out_family(
    numels: Sequence[int], dtype: torch.dtype, state: Mapping[str, Part], chunk_bytes: int,
    computed: torch.dtype | None,
) -> tuple[Layout, dict[str, Layout]]:  # fmt: skip
    """Where parameters of one dtype stand in their run, and what mirrors it, by name.

    ``computed``: in which type frames hold what is floating, None: as it is.
    """
    block = max((part.elements for part in state.values()), default=1)
    page = page_elements(block)
    narrowest = min(dtype.itemsize, (computed or dtype).itemsize)
    chunk_elements = max(chunk_bytes // dtype.itemsize // page, 1) * page
    layout = lay_out(numels, chunk_elements, block, align_elements(narrowest))
    return layout, {
        name: layout if part.elements == 1 else layout.coarser(part.elements)
        for name, part in state.items()
    }


def build_family(
    space: HomeSpace,
    named: list[tuple[str, nn.Parameter]],
    trained: bool,
    state: dict[str, Part],
    chunk_bytes: int,
    computed: torch.dtype | None = None,
) -> Family:
    """Reserve homes for parameters of one dtype and for all that mirrors them.

    ``state``: name and kind of each optimizer state tensor that does. ``computed``: as in
    `lay_out_family`.
    """
    dtype, numels = named[0][1].dtype, [p.numel() for _, p in named]
    itemsize = dtype.itemsize
    layout, mirrors = lay_out_family(numels, dtype, state, chunk_bytes, computed)
    family = Family(
        [n for n, _ in named], [p for _, p in named], trained, layout,
        space.add_region(f"weights ({named[0][0]}...)", layout, itemsize),
    )  # fmt: skip
    if trained:
        family.grads = space.add_region(f"gradients ({named[0][0]}...)", layout, itemsize)
        for name, part in state.items():
            family.states[name] = space.add_region(
                f"{name} ({named[0][0]}...)", mirrors[name], part.dtype.itemsize
            )
    return family
