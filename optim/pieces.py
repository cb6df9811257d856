"""Cut parameters into pieces that fit the cache, and put the stepped pieces' state back.

A piece is a plain tensor over a range of the parameter's own memory with a gradient and a
state of its own, so that the optimizer sees an ordinary small parameter. Elementwise
optimizers only: for them a step over the pieces gives the bits of a step over the whole, and
the for-loop kernels, which sweep each tensor a dozen times, find it in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from offload.errors import OffloadError
from offload.optim.groups import own_copy, same
from offload.optim.mixed import Workspace
from offload.optim.narrow import Kept
from offload.optim.state import Segment, StateHomes

ALIGN_ELEMENTS = 16
ALIGN_BYTES = 64


def align_elements(dtype: torch.dtype) -> int:
    """A cut at a multiple of this many elements leaves every vectorised kernel's bits alone.

    The CPU kernels run 64-byte vectors and treat what is left of the last one by other
    instructions, whose results may differ in the last bit.
    """
    return max(ALIGN_ELEMENTS, ALIGN_BYTES // dtype.itemsize)


def check_segment(segment: Segment, elementwise: bool) -> None:
    """Raise OffloadError for a cut that would change the numbers."""
    param, start, stop = segment.param, segment.start, segment.stop
    if (start, stop) == (0, param.numel()):
        return
    if not elementwise or not param.is_contiguous():
        raise OffloadError(
            f"a parameter of shape {tuple(param.shape)} must be updated whole, but its group "
            f"holds elements {start} to {stop} only"
        )
    step = align_elements(param.dtype)
    if start % step or (stop % step and stop != param.numel()):
        raise OffloadError(
            f"elements {start} to {stop} of a parameter of shape {tuple(param.shape)} "
            f"do not begin and end at multiples of {step}"
        )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements per piece and per call of the optimizer; None: as many as there are."""

    piece_elements: int | None
    call_elements: int | None


@dataclass(slots=True, eq=False)
class Source:
    """One segment with everything its pieces are views of. ``flats`` is None for a whole step.

    ``converts``: the optimizer sees ``grad`` in the parameter's dtype. ``step``: how many steps its
    group has taken with narrowed state.
    """

    segment: Segment
    group: int
    grad: Tensor
    entries: dict[str, Any]  # the parameter's state before this step; empty at its first
    sizes: Sizes
    element_names: frozenset[str]  # the state that is known to be per element
    flats: dict[str, Tensor] | None = None  # per-element state, flattened
    weight: Tensor | None = None  # where there are flats, the parameter, flattened
    kept: dict[str, Kept] = field(default_factory=dict)  # state that is stored narrow
    step: int = 0
    converts: bool = False


@dataclass(slots=True, eq=False)
class Piece:
    """What a shadow steps: elements ``start`` to ``stop`` of a source's parameter."""

    source: Source
    start: int
    stop: int
    tensor: Tensor = field(init=False)
    state: dict[str, Any] = field(init=False)

    def prepare(self, coefficient: Tensor | None, workspace: Workspace) -> None:
        """Make the tensor, its gradient (times ``coefficient``) and its state.

        Views, no copies, but for a gradient of another dtype: that one is in the workspace.
        """
        source, param = self.source, self.source.segment.param
        if source.flats is None or source.weight is None:
            self.state = dict(source.entries)
            self.tensor = param
            if coefficient is not None or source.converts or source.grad is not param.grad:
                grad = source.grad.to(param.dtype) if source.converts else source.grad
                self.tensor = param.detach()
                self.tensor.grad = grad if coefficient is None else grad * coefficient
            return
        where = slice(self.start, self.stop)
        grad = source.grad[where]
        if source.converts:
            grad = workspace.convert(grad, param.dtype)
        self.tensor = source.weight[where]
        self.tensor.grad = grad if coefficient is None else grad * coefficient
        self.state = {
            name: source.flats[name][where] if name in source.flats else own_copy(value)
            for name, value in source.entries.items()
        } | {name: kept.widen(self.start, self.stop) for name, kept in source.kept.items()}


def check_grad(param: nn.Parameter, grad: Tensor) -> None:
    """Raise OffloadError for a gradient that has no dense home or is of another shape."""
    if grad.shape != param.shape:
        raise OffloadError(
            f"the gradient of a parameter of shape {tuple(param.shape)} has shape "
            f"{tuple(grad.shape)}"
        )
    if grad.layout != torch.strided:
        raise OffloadError(
            f"the gradient of a parameter of shape {tuple(param.shape)} is {grad.layout}; only "
            "dense gradients can be kept elsewhere: use sparse=False in nn.Embedding"
        )


def flatten(source: Source) -> None:
    """Let the source be cut, unless it is stepped whole: then nothing needs a view or a copy.

    Whole are scalars and empty tensors, what fits one piece, and what has no flat view. What has
    narrowed state, which is contiguous and elementwise, is always cut; so is a gradient that is
    converted, where possible: it is then converted into memory that is in the cache.
    """
    segment, param = source.segment, source.segment.param
    if (segment.start, segment.stop) == (0, param.numel()):
        piece_elements = source.sizes.piece_elements
        whole = piece_elements is None or param.dim() == 0 or param.numel() == 0
        fits = whole or (not source.converts and param.numel() <= (piece_elements or 0))
        plain = param.is_contiguous() and source.grad.is_contiguous()
        if not source.kept and (fits or not plain):
            return
    source.grad = source.grad.detach().reshape(-1)
    # A detached view shares the parameter's version counter, unlike `.data`.
    source.weight = param.detach().view(-1)
    source.flats = {
        name: value.view(-1)
        for name, value in source.entries.items()
        if isinstance(value, Tensor) and value.dim() > 0 and value.numel() == param.numel()
    }


def cut(source: Source) -> Iterator[Piece]:
    """The segment in pieces; the last takes the rest."""
    start, stop = source.segment.start, source.segment.stop
    piece_elements = source.sizes.piece_elements
    if source.flats is None or piece_elements is None:
        yield Piece(source, start, stop)
        return
    while start < stop:
        end = min(start + piece_elements, stop)
        yield Piece(source, start, end)
        start = end


def batches(pieces: list[Piece], limit_elements: int | None) -> Iterator[list[Piece]]:
    """Consecutive pieces for one call of the optimizer, at most ``limit_elements`` together."""
    if limit_elements is None:
        yield pieces
        return
    batch: list[Piece] = []
    total = 0
    for piece in pieces:
        if batch and total + piece.stop - piece.start > limit_elements:
            yield batch
            batch, total = [], 0
        batch.append(piece)
        total += piece.stop - piece.start
    if batch:
        yield batch


class StateMerge:
    """One parameter's new state, gathered piece by piece; written back when all are done."""

    def __init__(self, param: nn.Parameter, homes: StateHomes) -> None:
        self._param = param
        self._homes = homes
        self._left = param.numel()
        self._entries: dict[str, Any] = {}  # homes, and scalars that every piece agrees on
        self._kept: dict[str, Kept] = {}  # narrowed state that is being made

    def absorb(self, piece: Piece, after: dict[str, Any]) -> bool:
        """Take a stepped piece's state; True when it was the parameter's last piece.

        Raises OffloadError when pieces end with different scalars.
        """
        codecs = self._homes.narrowing.of(self._param)
        for name, value in after.items():
            if name in codecs:
                self._absorb_narrow(piece, name, value)
            elif self._is_element_state(piece, name, value):
                self._absorb_tensor(piece, name, value)
            elif name not in self._entries:
                self._entries[name] = value
            elif not same(self._entries[name], value):
                raise OffloadError(
                    f"pieces of one parameter of shape {tuple(self._param.shape)} ended with "
                    f"different {name!r}: {self._entries[name]!r} and {value!r}"
                )
        self._left -= piece.stop - piece.start
        return self._left == 0

    def _is_element_state(self, piece: Piece, name: str, value: object) -> bool:
        if not isinstance(value, Tensor):
            return False
        if piece.source.flats is None or name in piece.source.flats:
            return True
        if value.dim() == 0 or value.numel() != piece.stop - piece.start:
            return False
        return name in piece.source.element_names or value.numel() > 1 or self._param.numel() == 1

    def _absorb_tensor(self, piece: Piece, name: str, value: Tensor) -> None:
        source = piece.source
        if source.flats is None:  # a whole parameter: nothing to join
            known = value is source.entries.get(name)
            self._entries[name] = value if known else self._homes.place(self._param, name, value)
            return
        if name in source.flats and value is piece.state[name]:
            self._entries[name] = source.entries[name]  # updated in its home
            return
        if name not in self._entries:
            self._entries[name] = (
                source.entries[name]
                if name in source.flats
                else self._homes.reserve(self._param, name, value.dtype)
            )
        with torch.no_grad():
            self._entries[name].view(-1)[piece.start : piece.stop].copy_(value.view(-1))

    def _absorb_narrow(self, piece: Piece, name: str, value: Tensor) -> None:
        kept = piece.source.kept.get(name) or self._kept.get(name)
        if kept is None:
            kept = self._homes.reserve_narrow(self._param, name, piece.source.step)
            self._kept[name] = kept
        kept.narrow(value, piece.start)
        self._entries |= kept.parts

    def commit(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """Make ``state[param]`` the gathered state; scalar tensors change in place."""
        if not self._entries and self._param not in state:
            return
        entries = state[self._param]
        for name in entries.keys() - self._entries.keys():
            del entries[name]
        for name, value in self._entries.items():
            old = entries.get(name)
            if old is value:
                continue
            if _is_scalar(old) and _is_scalar(value) and old.dtype == value.dtype:
                old.copy_(value)
            else:
                entries[name] = value


def _is_scalar(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() == 0
