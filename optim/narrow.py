"""Which optimizer state is stored in fewer bytes than the optimizer computes with.

The optimizer sees each piece of its state widened to its own dtype and steps it; what comes out
is narrowed again (`codecs`). Nothing else changes: a narrowed tensor has homes that mirror the
weights' (`Part`), and chunk i of them is what the update of chunk i of the weights needs.
``optimizer.state[p]["exp_avg"]`` is what is stored: bfloat16 values; or 8-bit codes, beside
their scales in ``["exp_avg.scale"]``, which ``state_dict()`` shows as the values that they mean.
Steps are counted in ``param_groups[i][COUNTER]``, which travels with every state_dict.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from offload.optim.codecs import Codec, Noise, Part, noise_table
from offload.optim.groups import shadow

if TYPE_CHECKING:
    from offload.optim.mirror import OptimizerProfile

COUNTER = "narrowed_steps"


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """One narrowed state tensor of one parameter. ``parts`` are its homes, by full name."""

    codec: Codec
    parts: Mapping[str, Tensor]
    table: Tensor
    key: int

    def widen(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop``, in the optimizer's own dtype."""
        return self.codec.widen(self._range(start, stop))

    def narrow(self, values: Tensor, start: int, *, nearest: bool = False) -> None:
        """Store ``values`` [any shape], in row-major order, at element ``start`` and on."""
        flat = values.detach().reshape(-1)
        noise = None if nearest else Noise(self.table, self.key, start)
        self.codec.narrow(flat, self._range(start, start + flat.numel()), noise)

    def _range(self, start: int, stop: int) -> list[Tensor]:
        """That range of each part; ``start`` is a multiple of the block."""
        return [
            tensor.view(-1)[start // part.elements : -(-stop // part.elements)]
            for tensor, part in zip(self.parts.values(), self.codec.parts.values(), strict=True)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Narrowing:
    """Which state of which parameters is narrowed, and how. As made by default: none."""

    state_dtype: str | None = None
    codecs: Mapping[Tensor, Mapping[str, Codec]] = field(default_factory=dict)
    order: Mapping[Tensor, int] = field(default_factory=dict)
    table: Tensor = field(default_factory=noise_table)

    def of(self, param: Tensor) -> Mapping[str, Codec]:
        """The codecs of one parameter's state, by name."""
        return self.codecs.get(param, {})

    def kept(self, param: Tensor, entries: Mapping[str, Any], step: int) -> dict[str, Kept]:
        """The state among a parameter's ``entries`` that is stored narrow, by its own name."""
        found: dict[str, Kept] = {}
        for name, codec in self.of(param).items():
            parts = {
                name + suffix: tensor
                for suffix, part in codec.parts.items()
                if isinstance(tensor := entries.get(name + suffix), Tensor)
                and tensor.dtype == part.dtype
            }
            if len(parts) == len(codec.parts):
                found[name] = self.keep(param, name, parts, step)
        return found

    def keep(self, param: Tensor, name: str, parts: Mapping[str, Tensor], step: int) -> Kept:
        """One narrowed state tensor in the homes of its parts."""
        text = f"{self.order[param]}/{name}/{step}".encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        return Kept(self.of(param)[name], parts, self.table, key)

    @staticmethod
    def others(kept: Mapping[str, Kept], entries: Mapping[str, Any]) -> dict[str, Any]:
        """A parameter's entries without those that are stored narrow."""
        hidden = {part for one in kept.values() for part in one.parts}
        return {name: value for name, value in entries.items() if name not in hidden}

    def count(self, optimizer: Optimizer) -> None:
        """A step is over: the next rounds by other bits."""
        if self.state_dtype == "bf16":
            for group in optimizer.param_groups:
                group[COUNTER] = group.get(COUNTER, 0) + 1

    def mirrors(self, learnt: OptimizerProfile | None, param: nn.Parameter) -> dict[str, Part]:
        """Everything stored that mirrors a parameter, by full name."""
        found: dict[str, Part] = {}
        for tensor in learnt.params[param].state if learnt and param in learnt.params else ():
            codec = self.of(param).get(tensor.name)
            if codec is not None:
                found |= {tensor.name + suffix: part for suffix, part in codec.parts.items()}
            elif tensor.shape == tuple(param.shape):
                found[tensor.name] = Part(tensor.dtype)
        return found

    def copies(self, learnt: OptimizerProfile | None, param: nn.Parameter) -> int:
        """What mirrors a parameter, in bytes of the parameter, rounded up."""
        stored = sum(part.bytes_per_element for part in self.mirrors(learnt, param).values())
        return math.ceil(stored / param.element_size())

    def widened(self, optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], str, Kept]]:
        """Every narrowed tensor of an optimizer: its entries, its name, and what is kept."""
        for param, entries in optimizer.state.items():
            for name, kept in self.kept(param, entries, 0).items():
                yield entries, name, kept

    def as_learnt(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer as `mirror.profile` wants to see it: state of its own dtypes."""
        seen: dict[Tensor, dict[str, Any]] = {}
        for param, entries in optimizer.state.items():
            kept = self.kept(param, entries, 0)
            seen[param] = self.others(kept, entries)
            for name, one in kept.items():
                seen[param][name] = one.widen(0, 1).expand(param.shape)
        return shadow(optimizer, optimizer.param_groups, seen)


def widen_state(narrowing: Narrowing, optimizer: Optimizer) -> None:
    """Give an optimizer plain state of its own dtypes again; all of it must fit in memory."""
    for entries, name, kept in list(narrowing.widened(optimizer)):
        whole = kept.widen(0, entries[name].numel()).view(entries[name].shape)
        for part in kept.parts:
            del entries[part]
        entries[name] = whole


def show_in_state_dict(narrowing: Narrowing, optimizer: Optimizer) -> None:
    """Let ``optimizer.state_dict()`` show codes and scales as the values that they stand for.

    It goes on when the run is closed, since the state stays as it is stored.
    """

    def widen(optimizer: Optimizer, shown: dict[str, Any]) -> dict[str, Any]:
        params = (p for group in optimizer.param_groups for p in group["params"])
        state = dict(shown["state"])
        for index, param in enumerate(params):
            entries = dict(state.get(index, {}))
            for name, kept in narrowing.kept(param, entries, 0).items():
                for part in kept.parts:
                    del entries[part]
                entries[name] = kept.widen(0, param.numel()).view(param.shape)
            if index in state:
                state[index] = entries
        return {**shown, "state": state}

    if narrowing.state_dtype == "int8":
        optimizer.register_state_dict_post_hook(widen)
