"""Linear layers whose weights are stored in 4 or 8 bits and widened while they compute.

A layer keeps its identity, its hooks and its bias; its class changes, and in place of ``weight`` it
has one frozen uint8 parameter, ``packed``. To the engine that is a parameter like any other: it has
a home and chunks, is fetched, evicted and copied to a device as they are. The layer widens it block
by block into memory that stays in the cache and multiplies with each block, so that a whole weight
never exists, neither in the forward pass nor in the backward pass (of adapters beside it). Blocks
depend on the shape alone, hence so do the bits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.errors import OffloadError
from offload.groupwise import GROUP, Format, Scratch, pack
from offload.tiers.spec import format_size

# Measured on two cores: with less, starting the kernels shows; with more it leaves the cache.
BLOCK_ELEMENTS = 1 << 20
NOTED_BYTES = 1 << 20  # a weight that stays as it is and is larger than this is named

Widened = Callable[[Tensor, torch.dtype], Iterator[tuple[slice, Tensor]]]
Allocate = Callable[[tuple[int, int]], Tensor]  # a uint8 tensor of this shape, contents undefined


class Quantised(nn.Module):
    """What quantised layers share: ``packed`` [rows, bytes], rows being output features."""

    packed: nn.Parameter
    form: Format
    scratch: Scratch
    columns: int  # input features
    dtype: torch.dtype  # of the weight as it was
    transposed: bool  # ``weight`` is [columns, rows]
    bias: nn.Parameter | None

    @property
    def weight(self) -> Tensor:
        """The widened weight, made anew by each access: writing to it changes nothing."""
        packed = self.packed
        values = packed.new_empty(packed.shape[0], self.columns, dtype=self.dtype)
        for rows, block in self.widened(packed, self.dtype):
            values[rows].copy_(block)
        return values.t() if self.transposed else values

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise OffloadError(
                f"this weight is stored as {self.form.name} codes and cannot be replaced: load the "
                "model without weight_dtype=... to change its weights or to tie them"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Floating x [..., columns] -> [..., rows], in the type of x, or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Tensor = Product.apply(x, self.packed, self.widened)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def widened(self, packed: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their weights [rows, columns] in ``dtype``), good until the next is asked for."""
        with self.scratch.borrowed(packed.device) as scratch:
            for rows in blocks(packed.shape[0], self.columns):
                yield rows, scratch.unpack(packed[rows], self.form, dtype)[:, : self.columns]

    def extra_repr(self) -> str:
        return f"{self.columns}, {self.packed.shape[0]}, weight_dtype={self.form.name}"


class QuantisedLinear(Quantised, nn.Linear):  # type: ignore[misc, override]
    """``torch.nn.Linear`` with a packed weight."""


class QuantisedConv1D(Quantised):
    """``transformers.pytorch_utils.Conv1D`` (GPT-2's linear layer) with a packed weight."""


class Product(torch.autograd.Function):
    """``x @ weight.t()``. Saved for the backward pass are the codes, which are at home anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, widened: Widened) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.widened, ctx.shape = widened, x.shape
        tokens = x.reshape(-1, x.shape[-1])
        y = x.new_empty(tokens.shape[0], packed.shape[0])
        for rows, weight in widened(packed, x.dtype):
            torch.mm(tokens, weight.t(), out=y[:, rows])
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        grad = grads[0].reshape(-1, packed.shape[0])
        # Blocks are added up in float32, as one product adds up its terms.
        total = grad.new_zeros(grad.shape[0], ctx.shape[-1], dtype=torch.float32)
        for rows, weight in ctx.widened(packed, grad.dtype):
            total += grad[:, rows] @ weight
        return total.to(grad.dtype).view(ctx.shape), None, None


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a weight in runs of about ``BLOCK_ELEMENTS``."""
    step = block_rows(columns)
    return (slice(a, min(a + step, rows)) for a in range(0, rows, step))


def block_rows(columns: int) -> int:
    """Rows of a block."""
    return max(BLOCK_ELEMENTS // columns, 1)


def scratch_bytes(model: nn.Module) -> int:
    """Bytes of what the layers of a model widen in."""
    shared = {m.scratch for m in model.modules() if isinstance(m, Quantised)}
    return sum(Scratch.bytes_for(s.elements) for s in shared)


def quantise(
    model: nn.Module, form: Format, optimizer: Optimizer | None, allocate: Allocate,
    say: Callable[[str], None], *, contents: bool = True,
) -> None:  # fmt: skip
    """Change every linear layer that ``candidates`` gives into a quantised one, one at a time.

    Without ``contents`` codes are left undefined: for models that have no data either.
    Raises OffloadError, before anything is changed, when there is none; and naming the layer for
    weights that cannot be quantised (those before it are changed by then).
    """
    found = candidates(model, form, optimizer)
    if not found:
        trained = any(map(_is_linear, model.modules()))
        why = "its linear layers are trained or tiny" if trained else "it has no linear layers"
        raise OffloadError(
            f"weight_dtype={form.name!r} finds nothing to quantise in this model: {why}. Quantised "
            "weights cannot be trained: freeze them, and train adapters beside them"
        )
    scratch = Scratch(max(_block_elements(layer) for _, layer in found))
    before = after = 0
    done: dict[nn.Parameter, nn.Parameter] = {}  # tied layers stay tied
    for name, layer in found:
        weight = layer.weight
        if weight not in done:
            packed = allocate(_packed_shape(layer, form))
            if contents:
                _pack_into(packed, name, layer, form)
            done[weight] = nn.Parameter(packed, requires_grad=False)
            before += weight.nbytes
            after += done[weight].nbytes
        _change(layer, done[weight], form, scratch)
    stay = [
        n for n, p in model.named_parameters() if p.nbytes > NOTED_BYTES and p.is_floating_point()
    ]
    say(
        f"{len(done)} weights are {form.name} now, {format_size(after)} for {format_size(before)}"
        + (f"; as they were: {', '.join(stay)}" if stay else "")
    )


def candidates(
    model: nn.Module, form: Format, optimizer: Optimizer | None = None
) -> list[tuple[str, Any]]:
    """Linear layers, by name, that gain by it and whose weights ``optimizer`` does not train.

    Subclasses are left alone: their code may use the weight in other ways.
    """
    groups = optimizer.param_groups if optimizer is not None else []
    trained = {p for group in groups for p in group["params"] if p.requires_grad}
    return [
        (name, m) for name, m in model.named_modules()
        if _is_linear(m) and m.weight not in trained and m.weight.is_floating_point()
        if m.weight.numel() and packed_bytes(m, form) < m.weight.nbytes
    ]  # fmt: skip


def packed_bytes(layer: Any, form: Format) -> int:
    """Bytes of a linear layer's weight once packed."""
    rows, row_bytes = _packed_shape(layer, form)
    return rows * row_bytes


def sizes_after(
    model: nn.Module, form: Format, optimizer: Optimizer | None
) -> Iterator[tuple[int, str]]:
    """(bytes, name) of what the parameters will be, to be checked before anything is changed."""
    changed = {m.weight: m for _, m in candidates(model, form, optimizer)}
    for name, param in model.named_parameters():
        yield packed_bytes(changed[param], form) if param in changed else param.nbytes, name


def _packed_shape(layer: Any, form: Format) -> tuple[int, int]:
    rows, columns = _as_rows(layer).shape
    return int(rows), form.row_bytes(int(columns))


def _pack_into(packed: Tensor, name: str, layer: Any, form: Format) -> None:
    weight = _as_rows(layer)
    rows, columns = weight.shape
    try:
        for part in blocks(rows, columns):
            packed[part].copy_(pack(weight[part], form))
    except ValueError as error:
        raise OffloadError(f"{name}.weight cannot be {form.name}: it has {error}") from error


def _change(layer: Any, packed: nn.Parameter, form: Format, scratch: Scratch) -> None:
    """Make a linear layer a quantised one: the same object, so hooks and references stay."""
    columns, dtype = _as_rows(layer).shape[1], layer.weight.dtype
    transposed = not isinstance(layer, nn.Linear)
    del layer.weight
    layer.__class__ = QuantisedConv1D if transposed else QuantisedLinear
    layer.register_parameter("packed", packed)
    layer.form, layer.scratch = form, scratch
    layer.columns, layer.dtype, layer.transposed = columns, dtype, transposed


def _block_elements(layer: Any) -> int:
    """Of its largest block, with what fills up its groups."""
    rows, columns = _as_rows(layer).shape
    return min(block_rows(columns), rows) * -(-columns // GROUP) * GROUP


def _as_rows(layer: Any) -> Tensor:
    """A linear layer's weight with output features as rows, a view."""
    weight: Tensor = layer.weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.t()


def _is_linear(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(module) is transformers.Conv1D
