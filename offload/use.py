"""How compute gets at weights: an identity in the graph per access, and a dict that makes it.

The parameters themselves stay CPU tensors over their homes, so ``.grad``, hooks, ``autograd.grad``
and optimizers see what they always saw. What a module reads inside the model's forward pass is
``Use(param)``: the value from a frame, with a node of its own that leads to the parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from offload.device import DeviceSpace
from offload.saved import STALE, Activations, Packed, Saved, Visitor

GradientPath = Callable[[nn.Parameter, Tensor], Tensor]


class Use(torch.autograd.Function):
    """Identity from a parameter to a view of its frame; back, the gradient goes to the host.

    One node per access: a node shared by several uses would add their gradients up in another
    order than autograd does at the parameter, and change bits.
    """

    @staticmethod
    def forward(
        ctx: Any, param: nn.Parameter, view: Tensor, home: GradientPath, alive: object
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.param, ctx.home, ctx.alive = param, home, alive
        return view

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None, None, None]:
        (grad,) = grads
        return (None if grad is None else ctx.home(ctx.param, grad)), None, None, None


class UseDict(dict[str, Any]):
    """A module's ``_parameters`` whose values, read by name, go through ``use``.

    Iteration gives the parameters themselves. Copies and pickles are plain dicts: a copy of a
    managed model is a plain model.
    """

    def __init__(self, params: dict[str, Any], use: Callable[[nn.Parameter], Tensor]) -> None:
        super().__init__(params)
        self._use = use

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        return self._use(param) if isinstance(param, nn.Parameter) else param

    def plain(self) -> dict[str, Any]:
        """The parameters in a dict as torch makes it."""
        return dict(self.items())

    def __copy__(self) -> dict[str, Any]:
        return self.plain()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.plain(), memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.plain(),)


def attach(model: nn.Module, use: Callable[[nn.Parameter], Tensor]) -> None:
    """Have every module of a model read its weights through ``use``."""
    for module in model.modules():
        if module._parameters:
            module.__dict__["_parameters"] = UseDict(module._parameters, use)


def detach(model: nn.Module) -> None:
    """Undo ``attach``."""
    for module in model.modules():
        if isinstance(module._parameters, UseDict):
            module.__dict__["_parameters"] = module._parameters.plain()


class SavedWeight:
    """A saved tensor that lies in a frame, as a place that can be found again."""

    __slots__ = (
        "chunk", "dtype", "fetch", "offset", "param", "shape", "stride", "version", "visit",
    )  # fmt: skip

    def __init__(
        self, tensor: Tensor, chunk: int, offset: int, param: nn.Parameter,
        fetch: Callable[[SavedWeight], Tensor],
    ) -> None:  # fmt: skip
        self.chunk = chunk
        self.offset = offset  # in elements of dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.dtype = tensor.dtype
        self.param = param
        self.version = param._version
        self.fetch = fetch
        self.visit: Visitor | None = None

    def check(self) -> Tensor:
        """The tensor, in a frame. Raises as torch does when the weight was written to since."""
        if self.param._version != self.version:
            raise RuntimeError(
                STALE.format(shape=list(self.shape), now=self.param._version, then=self.version)
            )
        return self.fetch(self)


class SavedInFrames:
    """The pair of saved-tensor hooks. ``fetch`` makes a saved weight's chunk resident."""

    def __init__(
        self,
        space: DeviceSpace,
        fetch: Callable[[nn.Parameter], None],
        activations: Activations,
        running: Callable[[], bool],
        save_here: Callable[[Tensor], Saved | None] = lambda _: None,
    ) -> None:
        self.visit: Visitor | None = None  # of the unit whose forward runs
        self._running = running
        self._save_here = save_here
        self._space = space
        self._fetch = fetch
        self._activations = activations

    def pack(self, tensor: Tensor) -> Packed:
        """Autograd saves a tensor."""
        if not self._running():  # an interrupt left these hooks behind
            return Saved(tensor, (), None)
        weight = self.weight(tensor)
        if weight is not None:
            weight.visit = self.visit
            return weight
        if self.visit is None:
            return Saved(tensor, (), self._activations)
        return self.visit.pack(tensor)

    def unpack(self, packed: Packed) -> Tensor:
        """Autograd is about to use it."""
        return packed.check()

    def weight(self, tensor: Tensor) -> SavedWeight | Saved | None:
        """What is held in place of a weight, in a frame or living here; None where it is none."""
        here = self._save_here(tensor)
        if here is not None:
            return here
        chunk = self._space.pool.owner_of(tensor) if tensor.numel() else None
        if chunk is None or tensor.is_conj() or tensor.is_neg():
            return None  # a lazily conjugated view keeps its frame instead
        offset = tensor.data_ptr() - tensor.untyped_storage().data_ptr()
        if offset % tensor.element_size():
            return None
        param = self._space.param_at(chunk, offset)
        return SavedWeight(tensor, chunk, offset // tensor.element_size(), param, self._rebuild)

    def _rebuild(self, saved: SavedWeight) -> Tensor:
        self._fetch(saved.param)
        return self._space.rebuild(
            saved.chunk, saved.dtype, saved.shape, saved.stride, saved.offset
        )
