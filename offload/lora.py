"""Low-rank adapters beside frozen linear layers (Hu et al. 2021), as `peft` lays them out.

For forecasts, and for runs that measure what forecasts say: each linear layer but the output head
gets two matrices, ``lora_a`` [rank, in] and ``lora_b`` [out, rank]; nothing else is trained. As in
peft they are float32 where the weights are in a half type. Stacked experts are no linear layers,
so they get none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offload.errors import OffloadError
from offload.quantised import Quantised


class Adapted(nn.Module):
    """A linear layer with an adapter: ``base(x) + b(a(x))``, x [..., in] -> [..., out]."""

    base_layer: Any  # a linear layer, quantised or not
    lora_a: nn.Linear
    lora_b: nn.Linear

    def __init__(self, base: nn.Module, shape: tuple[int, int], rank: int) -> None:
        super().__init__()
        rows, columns = shape
        self.base_layer = base
        self.lora_a = nn.Linear(columns, rank, bias=False, dtype=torch.float32)
        self.lora_b = nn.Linear(rank, rows, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.lora_b.weight)

    def __getattr__(self, name: str) -> Any:
        """What models ask of a linear layer (``weight``, ``bias``) is the base's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        added: Tensor = self.lora_b(self.lora_a(x.to(self.lora_a.weight.dtype)))
        return y + added.to(y.dtype)


def add_adapters(model: Any, rank: int) -> None:
    """Freeze a model and put adapters beside its linear layers. Raises OffloadError, ValueError."""
    if rank < 1:
        raise ValueError(f"the rank of adapters must be at least 1, not {rank}")
    model.requires_grad_(False)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        (parent, name, child, shape)
        for parent in model.modules()
        for name, child in parent.named_children()
        if child is not head and (shape := _shape(child)) is not None
    ]
    if not found:
        raise OffloadError("this model has no linear layers that could have adapters")
    for parent, name, child, shape in found:
        setattr(parent, name, Adapted(child, shape, rank))


def _shape(module: Any) -> tuple[int, int] | None:
    """(out, in) of a linear layer; None for any other module."""
    if isinstance(module, Quantised):
        return module.packed.shape[0], module.columns
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's, transposed
        return int(module.weight.shape[1]), int(module.weight.shape[0])
    return None
