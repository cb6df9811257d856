"""What graphs of autograd hold of weights that live on the device: those cannot go home meanwhile.

A gradient is delivered where the parameter was when it was read, and what autograd saved stays in
memory, whatever becomes of the parameter.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakSet, ref

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from offload.saved import Saved


class _Mark:
    """Lives as long as the node of autograd that adds up a parameter's gradient."""

    __slots__ = ("__weakref__",)


class Graphs:
    """Which parameters graphs of this step lead to, and which storages they have saved."""

    def __init__(self) -> None:
        self._marks: dict[nn.Parameter, ref[_Mark]] = {}
        self._nodes: dict[nn.Parameter, Any] = {}  # else they would die before they are used
        self._saved: dict[int, WeakSet[Saved]] = {}  # by address

    def read(self, param: nn.Parameter) -> None:
        """A graph that is being made may lead to it."""
        if param in self._nodes:
            return
        node: Any = get_gradient_edge(param).node
        self._nodes[param] = node
        if not self._lead_to(param):
            mark = node.metadata["offload"] = _Mark()
            self._marks[param] = ref(mark)

    def save(self, tensor: Tensor) -> Saved:
        """Autograd saves a tensor over memory that is debited already."""
        saved = Saved(tensor, (), None)
        self._saved.setdefault(tensor.untyped_storage().data_ptr(), WeakSet()).add(saved)
        return saved

    def hold(self, param: nn.Parameter, *storages: int) -> bool:
        """Whether they lead to a parameter, or hold memory at any of these addresses."""
        return self._lead_to(param) or any(self._saved.get(address) for address in storages)

    def rest(self) -> None:
        """A pass is over: nodes live as long as graphs refer to them."""
        self._nodes.clear()

    def forget(self) -> None:
        """Weights are about to be updated: graphs of before are of no use."""
        for noted in (self._marks, self._nodes, self._saved):
            noted.clear()

    def _lead_to(self, param: nn.Parameter) -> bool:
        mark = self._marks.get(param)
        return mark is not None and mark() is not None
