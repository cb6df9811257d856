"""Clipping by global norm without a second pass over gradients that are elsewhere.

`torch.nn.utils.clip_grad_norm_` reads every gradient twice and writes it once, after the
backward pass has sent it home. Here each gradient's norm is taken while it is still in
memory, and the coefficient is applied to the pieces that the update reads anyway.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_NORM_TYPE = 2.0
_EPSILON = 1e-6  # as in torch.nn.utils.clip_grads_with_norm_


@dataclass(frozen=True, slots=True)
class _Noted:
    """A norm and the gradient it belongs to: the very tensor, unchanged since."""

    grad: weakref.ref[Tensor]
    version: int
    norm: Tensor  # []

    def holds_for(self, grad: Tensor) -> bool:
        return self.grad() is grad and self.version == grad._version


class GradNorms:
    """L2 norms of gradients, noted when each became ready.

    A norm is used only for the same gradient tensor at the same version. Writes through
    ``p.grad.data`` or numpy do not change the version, as autograd does not see them either;
    ``untouched`` tells where such writes can be ruled out. Where not, the norm is taken again.
    """

    def __init__(self, untouched: Callable[[nn.Parameter], bool] = lambda _: True) -> None:
        self._untouched = untouched
        self._noted: dict[nn.Parameter, _Noted] = {}

    def note(self, param: nn.Parameter) -> None:
        """Take the norm of ``param.grad``, which is in memory and final unless changed later."""
        grad = param.grad
        if grad is None:
            self._noted.pop(param, None)
            return
        with torch.no_grad():
            norm = torch.linalg.vector_norm(grad, _NORM_TYPE)
        self._noted[param] = _Noted(weakref.ref(grad), grad._version, norm)

    def forget(self) -> None:
        """Drop every norm; they are taken again when needed."""
        self._noted.clear()

    def coefficient(self, params: Iterable[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
        """Total norm and factor of ``clip_grad_norm_(params, max_norm)``, same bits, both [].

        The order of ``params`` matters as it does there. Norms of gradients that changed since
        they were noted, or never were, are taken now. No gradient at all: (0, 1).
        """
        having = [p for p in params if p.grad is not None]
        grads = [p.grad for p in having if p.grad is not None]
        if not grads:
            return torch.tensor(0.0), torch.tensor(1.0)
        with torch.no_grad():
            if len({(g.device, g.dtype) for g in grads}) > 1:
                # torch sorts mixed gradients into an order of its own before it adds them up.
                total = torch.nn.utils.get_total_norm(grads, _NORM_TYPE)
                if len({g.device for g in grads}) > 1:
                    total = total.cpu()  # from there one number multiplies tensors anywhere
            else:
                norms = torch.stack([self._norm(p, g) for p, g in zip(having, grads, strict=True)])
                total = torch.linalg.vector_norm(norms, _NORM_TYPE)
            return total, torch.clamp(float(max_norm) / (total + _EPSILON), max=1.0)

    def _norm(self, param: nn.Parameter, grad: Tensor) -> Tensor:
        noted = self._noted.get(param)
        if noted is None or not noted.holds_for(grad) or not self._untouched(param):
            self.note(param)
            noted = self._noted[param]
        return noted.norm
