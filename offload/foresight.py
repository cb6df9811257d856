"""What a step needs to its end, so that a refusal in its midst can name a budget that works.

A copy of the model without data runs on fake tensors: the same operations and saved tensors, but
no bytes and no effect on the model. It runs in a thread of its own, where none of the hooks and
modes of the refused step are active.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from offload.bind import Binding, Home
from offload.engine import Engine
from offload.gradients import shared_params
from offload.guard import allocates
from offload.hook import hooks_of
from offload.internals import TorchDispatchMode, fake_mode, quietly, tree_leaves, tree_map
from offload.saved import span_bytes


class Foresight:
    """Asked when a step is refused. ``see`` notes what the model is called with, without data."""

    def __init__(self, model: nn.Module, engine: Engine, binding: Binding) -> None:
        self._model = model
        self._engine = engine
        self._binding = binding
        self._inputs: Any = None  # meta tensors in the place of tensors
        self._train = False
        self._before_bytes = 0

    def see(self, args: Any, kwargs: Any) -> None:
        """A forward pass begins with these arguments."""
        self._train = torch.is_grad_enabled()
        self._before_bytes = self._engine.ledger.other_bytes
        self._inputs = None
        # The casts of an outer autocast are not seen here, and objects must stay the user's own.
        plain = all(isinstance(x, _PLAIN) for x in tree_leaves((args, kwargs)))
        if plain and not torch.is_autocast_enabled("cpu"):
            self._inputs = _doubles((args, kwargs), "meta")

    def see_nothing(self) -> None:
        """A pass begins that cannot be rehearsed."""
        self._inputs = None

    def step_bytes(self) -> int:
        """Host memory with which a step of one such pass, forward and backward, works.

        0 where that cannot be told: the model computes depending on data, or cannot be copied.
        Tensors that are saved outside the model, for its loss, say, are not counted anywhere.
        """
        if self._inputs is None:
            return 0
        try:
            with quietly(), ThreadPoolExecutor(1) as thread:
                peak_bytes = thread.submit(self._rehearse).result()
        except Exception:  # user code may do anything that fake tensors cannot
            return 0
        engine = self._engine
        return engine.ledger.fixed_bytes + max(peak_bytes, engine.outlook.largest_update_bytes)

    def _rehearse(self) -> int:
        mode = fake_mode()
        model = _without_data(self._model, mode)
        rehearsal = Rehearsal(self._engine, self._before_bytes)
        rehearsal.watch(self._model, model, self._binding)
        with mode, torch.set_grad_enabled(self._train):
            args, kwargs = _doubles(self._inputs, "cpu")
            with rehearsal, torch.autograd.graph.saved_tensors_hooks(
                rehearsal.pack, rehearsal.unpack
            ):  # fmt: skip
                output = model(*args, **kwargs)
            if self._train:
                loss = getattr(output, "loss", None)
                ends = [x for x in tree_leaves(output if loss is None else loss)
                        if isinstance(x, Tensor) and x.requires_grad]  # fmt: skip
                del output, loss
                torch.autograd.backward(ends, [torch.empty_like(x) for x in ends])
        return rehearsal.peak_bytes


_PLAIN = (Tensor, int, float, str, type(None), torch.dtype, torch.device)


def _doubles(inputs: Any, device: str) -> Any:
    """Uninitialised tensors in the place of tensors, one for all places of one tensor."""
    known: dict[int, Tensor] = {}

    def double(x: Any) -> Any:
        if isinstance(x, Tensor) and id(x) not in known:
            known[id(x)] = torch.empty_strided(
                x.shape, x.stride(), dtype=x.dtype, device=device, requires_grad=x.requires_grad
            )
        return known.get(id(x), x)

    return tree_map(double, inputs)


def _without_data(model: nn.Module, mode: Any) -> nn.Module:
    """A copy whose tensors, whatever they are to it, have no data, and no hook of the user's."""
    held = (x for m in model.modules() for x in tree_leaves(m.__dict__) if isinstance(x, Tensor))
    tensors = [*model.parameters(), *model.buffers(), *held]
    double: nn.Module = copy.deepcopy(model, {id(t): mode.from_tensor(t) for t in tensors})
    for module in double.modules():
        for hooks in hooks_of(module):
            hooks.clear()
    return double


class Kept:
    """What autograd holds in place of a saved tensor of the rehearsal."""

    __slots__ = ("_release", "chunks", "tensor")

    def __init__(
        self, tensor: Tensor, chunks: tuple[int, ...], release: Callable[[], None] | None
    ) -> None:
        self.tensor, self.chunks, self._release = tensor.detach(), chunks, release

    def __del__(self) -> None:
        if self._release is not None:
            self._release()


class Rehearsal(TorchDispatchMode):
    """Counts what `Hooks` would ask the engine for. ``peak_bytes``: of chunks and all else."""

    def __init__(self, engine: Engine, other_bytes: int) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._engine = engine
        self._other_bytes = other_bytes
        self._last: frozenset[int] = frozenset()
        self._homes: dict[int, Home] = {}  # by the identity of their fake storage
        self._storages: dict[int, tuple[Any, int]] = {}  # saved: storage, holders
        self._in_flight: dict[Home, int] = {}
        self._settled: set[Home] = set()

    def watch(self, model: nn.Module, double: nn.Module, binding: Binding) -> None:
        """Hooks on the copy as `Hooks` has them on the model."""
        self._shared = shared_params(model)
        for real, module in zip(model.modules(), double.modules(), strict=True):
            chunks: set[int] = set()
            for param, fake in zip(real.parameters(False), module.parameters(False), strict=True):
                home = binding.homes.get(param)
                if home is None:
                    continue
                storage = fake.untyped_storage()
                self._storages[id(storage)] = (storage, 0)  # keeps it, and so its identity
                chunks.update(home.weight_chunks)
                if id(storage) not in self._homes and home.family.trained:
                    fake.register_hook(lambda _, h=home: self._before_gradient(h))
                    fake.register_post_accumulate_grad_hook(
                        lambda _, h=home: self._after_gradient(h)
                    )
                self._homes[id(storage)] = home
            if chunks and not isinstance(real, nn.Embedding):
                module.register_forward_pre_hook(lambda *_, c=frozenset(chunks): self._need(c))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if allocates(func):
            self._see(sum(x.nbytes for x in tree_leaves(result) if isinstance(x, Tensor)))
        return result

    # -- what the engine would be asked -----------------------------------------------------

    def _need(self, chunks: Iterable[int]) -> None:
        if not self._last.issuperset(chunks):
            self._last = frozenset(chunks)
        self._see(0)

    def _see(self, more_bytes: int) -> None:
        chunks = self._engine.space.chunks
        held_bytes = sum(chunks[c].size_bytes for c in self._last)
        self.peak_bytes = max(self.peak_bytes, held_bytes + self._other_bytes + more_bytes)

    def _take(self, size_bytes: int) -> None:
        self._see(size_bytes)
        self._other_bytes += size_bytes

    # -- autograd ---------------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Kept:
        """As `SavedTensors.pack`."""
        storage = tensor.untyped_storage()
        key = id(storage)
        home = self._homes.get(key)
        if home is not None:
            start = home.address + tensor.storage_offset() * tensor.element_size()
            return Kept(tensor, self._engine.space.chunks_at(int(start), span_bytes(tensor)), None)
        _, holders = self._storages.get(key, (storage, 0))
        if not holders:
            self._take(storage.nbytes())
        self._storages[key] = (storage, holders + 1)
        return Kept(tensor, (), lambda: self._let_go(key))

    def unpack(self, kept: Kept) -> Tensor:
        """As `SavedTensors.unpack`."""
        if kept.chunks:
            self._need(kept.chunks)
            home = self._homes[id(kept.tensor.untyped_storage())]
            if home.param in self._shared and home not in self._in_flight and home.family.trained:
                self._fly(home)
        return kept.tensor

    def _let_go(self, key: int) -> None:
        storage, holders = self._storages.pop(key)
        if holders > 1:
            self._storages[key] = (storage, holders - 1)
        else:
            self._other_bytes -= storage.nbytes()

    def _fly(self, home: Home) -> None:
        self._take(home.size_bytes)
        self._in_flight[home] = self._in_flight.get(home, 0) + home.size_bytes

    def _before_gradient(self, home: Home) -> None:
        self._fly(home)
        if home.grad_is_home or home in self._settled:
            self._need(home.grad_chunks)

    def _after_gradient(self, home: Home) -> None:
        if home.param.grad is None and home not in self._settled:
            split = home.param.is_contiguous()
            for group in [(c,) for c in home.grad_chunks] if split else [home.grad_chunks]:
                self._need(group)
            self._settled.add(home)
        self._other_bytes -= self._in_flight.pop(home)
