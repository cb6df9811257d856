"""One run of a unit within a forward pass: what becomes of the tensors that it saves."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from offload.errors import OffloadError
from offload.internals import tree_flatten
from offload.prefetch.policy import Choice, Way
from offload.rerun import Dropped, Rerun, Seen
from offload.saved import Activations, Packed, Saved
from offload.swap import LEAST_BYTES, Parked, SwapArea


class Visit:
    """One run of a unit. ``on_backward`` is told whenever something of it is about to be used."""

    def __init__(
        self, seen: Seen, choice: Choice, activations: Activations, rerun: Rerun | None,
        arguments: object, on_backward: Callable[[Visit], None],
    ) -> None:  # fmt: skip
        self.seen = seen
        self.choice = choice
        self.parked: list[weakref.ref[Parked]] = []
        self._rerun = rerun
        self._activations = activations
        self._on_backward = on_backward
        self._saved: list[weakref.ref[Saved]] = []
        leaves, _ = tree_flatten(arguments)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        self._inputs = frozenset(x.untyped_storage().data_ptr() for x in tensors)
        self._versions = [(weakref.ref(x), x._version) for x in tensors]

    def pack(self, tensor: Tensor) -> Packed:
        """Autograd saves a tensor that is not a weight."""
        if self._rerun is not None:
            return Dropped(self._rerun, tensor, self)
        saved = Saved(tensor, (), self._activations, self)
        self._saved.append(weakref.ref(saved))
        return saved

    def see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """An operation of its forward has given this."""
        if self._rerun is not None:
            self._rerun.results.see(func, args, result)

    def enter_backward(self) -> None:
        """Something of it is about to be used."""
        self._on_backward(self)

    def leave_forward(self, output: object, area: SwapArea | None) -> None:
        """Its forward is over: count what it saved, send away what is to go."""
        if self._changed_its_inputs():
            self.seen.recomputable = False
            if self._rerun is not None:
                raise OffloadError(
                    f"{self.seen.name} writes to a tensor that it was given, so it cannot be run "
                    'again for the backward pass; give offload.wrap activations="keep" or "swap"'
                )
        if self._rerun is not None:
            self._rerun.results.settle()
            return
        groups = self._groups()
        self.seen.saved_bytes = sum(
            size for at, (size, _) in groups.items() if at not in self._inputs
        )
        if self.choice.way is Way.SWAP and area is not None:
            leaves, _ = tree_flatten(output)
            stay = {x.untyped_storage().data_ptr() for x in leaves if isinstance(x, Tensor)}
            self._send_away(groups, stay | self._inputs, area)
        self._saved.clear()

    def read_ahead(self) -> None:
        """Begin to read back what was sent away, last first, as far as there is room."""
        for ref in reversed(self.parked):
            parked = ref()
            if parked is not None and not parked.read_ahead():
                return

    @property
    def is_away(self) -> bool:
        """Whether anything of it is on the disk alone."""
        return any((p := ref()) is not None and p.is_away for ref in self.parked)

    def forget(self) -> None:
        """Backward has gone on: what could be fetched or made again is let go of."""
        if self._rerun is not None:
            self._rerun.clear()
        for ref in self.parked:
            parked = ref()
            if parked is not None:
                parked.forget()

    def _groups(self) -> dict[int, tuple[int, list[Saved]]]:
        """Saved tensors by their storage: its address, its bytes, who shares it."""
        groups: defaultdict[int, list[Saved]] = defaultdict(list)
        sizes = {}
        for ref in self._saved:
            saved = ref()
            if saved is not None and saved.tensor is not None:
                storage = saved.tensor.untyped_storage()
                groups[storage.data_ptr()].append(saved)
                sizes[storage.data_ptr()] = storage.nbytes()
        return {at: (sizes[at], group) for at, group in groups.items()}

    def _send_away(
        self, groups: dict[int, tuple[int, list[Saved]]], stay: frozenset[int] | set[int],
        area: SwapArea,
    ) -> None:  # fmt: skip
        assert self.seen.saved_bytes is not None
        left_bytes = self.choice.swapped * self.seen.saved_bytes
        for at, (size_bytes, group) in groups.items():
            tensor = group[0].tensor
            if at in stay or size_bytes < LEAST_BYTES or tensor is None or not area.takes(tensor):
                continue
            if left_bytes <= 0:
                return
            left_bytes -= size_bytes
            del tensor  # nobody but the group holds it from here
            parked = area.park(group)
            if parked is None:
                return  # there is no room for more: the rest stays
            self.parked.append(weakref.ref(parked))

    def _changed_its_inputs(self) -> bool:
        """Whether the unit wrote to a tensor that it was given: then it cannot be run again."""
        return any((x := ref()) is not None and x._version != v for ref, v in self._versions)
