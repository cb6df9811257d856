"""Results of single operations, kept from a unit's forward pass for its rerun.

Selective recomputation (Korthikanti et al. 2022): what is small and took long stays, and what is
made of it is made again. An operation is known by its name and by how many of that name the unit
ran before it. What each takes is measured while a unit is run again in a recorded step.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offload.guard import allocates
from offload.internals import TorchDispatchMode, tree_leaves, tree_map_only
from offload.prefetch.policy import Part

if TYPE_CHECKING:
    from offload.saved import Activations
    from offload.site import Saving


class Names:
    """Numbers the operations of one run."""

    def __init__(self) -> None:
        self._counts: Counter[Any] = Counter()

    def of(self, func: Any) -> str:
        """The name of this call of an operation."""
        count = self._counts[func]
        self._counts[func] = count + 1
        return f"{func} {count}"


class _Kept:
    """One operation's result, counted while it is held.

    ``_witnesses``: the tensors that share its memory but not its version, of which some
    operations make one (``_unsafe_view``): whoever writes to the memory shows in one of them.
    """

    def __init__(self, result: Any, activations: Activations) -> None:
        self._activations = activations
        self._keys: list[int] = []
        self._result = result
        self._witnesses = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in self._witnesses:
            self._keys.append(activations.hold(x))

    def __del__(self) -> None:
        for key in self._keys:
            self._activations.release(key)

    @property
    def addresses(self) -> list[int]:
        """Of the storages that it holds."""
        return self._keys

    def witness(self, tensor: Tensor) -> None:
        """One more tensor over the memory of these."""
        self._witnesses.append(tensor)

    def settle(self) -> None:
        """The unit's forward is over: hold no graph."""
        self._result = tree_map_only(Tensor, Tensor.detach, self._result)
        self._witnesses = [x.detach() for x in self._witnesses]

    def take(self) -> Any:
        """The result, as an operation would give it; None when somebody has written to it."""
        if any(x._version for x in self._witnesses):
            return None
        return tree_map_only(Tensor, Tensor.detach, self._result)


class Results:
    """Of one run of a unit: those that are ``wanted``."""

    def __init__(self, activations: Activations) -> None:
        self.wanted: frozenset[str] = frozenset()
        self._activations = activations
        self._names = Names()
        self._kept: dict[str, _Kept] = {}
        self._at: dict[int, _Kept] = {}  # by the address of a storage, while the forward runs

    def see(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """An operation of the forward pass has given this."""
        if not self.wanted:
            return
        for x in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(x, Tensor) and self._at:
                kept = self._at.get(x.untyped_storage().data_ptr())
                if kept is not None:
                    kept.witness(x)
        name = self._names.of(func)
        if name in self.wanted and repeats(func, args, result):
            kept = self._kept[name] = _Kept(result, self._activations)
            self._at.update(dict.fromkeys(kept.addresses, kept))

    def settle(self) -> None:
        """The forward pass is over."""
        self._at.clear()
        for kept in self._kept.values():
            kept.settle()

    def take(self, name: str) -> Any:
        """What was kept of this operation, once; None where nothing is."""
        kept = self._kept.pop(name, None)
        return kept.take() if kept is not None else None

    def __bool__(self) -> bool:
        return bool(self._kept)

    def clear(self) -> None:
        """Nothing more is wanted: the rerun is over."""
        self._kept.clear()


class Allocating:
    """Whether operations make tensors; each is looked at once."""

    def __init__(self) -> None:
        self._known: dict[Any, bool] = {}

    def __call__(self, func: Any) -> bool:
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = allocates(func)
        return known


def repeats(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether an operation gives new tensors, draws no random numbers, and so can be left out."""
    if func is torch.ops.aten.clone.default:  # the rerun makes some of its own
        return False
    if not any(isinstance(x, Tensor) for x in tree_leaves(result)):
        return False
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return True
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    chances = [a for a in func._schema.arguments if a.name == "dropout_p"]
    return bool(chances) and all(given.get(a.name, a.default_value) == 0 for a in chances)


class Keeping(TorchDispatchMode):
    """Shows the running unit's visit what operations give, during a forward pass."""

    def __init__(self, saved: Saving, running: Callable[[], bool]) -> None:
        super().__init__()
        self._saved = saved
        self._running = running
        self._allocates = Allocating()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        visit = self._saved.visit
        if visit is not None and self._allocates(func) and self._running():
            visit.see(func, args, result)
        return result


class Again(TorchDispatchMode):
    """Leaves out, in a rerun, the operations whose results were kept."""

    def __init__(self, results: Results, computing: Callable[[], bool]) -> None:
        super().__init__()
        self._results = results
        self._computing = computing
        self._names = Names()
        self._allocates = Allocating()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._results and self._allocates(func) and self._computing():
            result = self._results.take(self._names.of(func))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


class Stopwatch(TorchDispatchMode):
    """Times the operations of a rerun that could be left out, by a clock that waits for them."""

    def __init__(self, clock: Callable[[], float], computing: Callable[[], bool]) -> None:
        super().__init__()
        self.parts: list[Part] = []
        self.calls = 0
        self._clock = clock
        self._computing = computing
        self._names = Names()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        if not allocates(func) or not self._computing():
            return func(*args, **(kwargs or {}))
        began_s = self._clock()
        result = func(*args, **(kwargs or {}))
        took_s = self._clock() - began_s
        name = self._names.of(func)
        if repeats(func, args, result):
            self.parts.append(Part(name, took_s, _bytes(tree_leaves(result))))
        return result


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.untyped_storage().nbytes() for x in tensors)


@cache
def handling_s(calls: int = 256, rounds: int = 5) -> float:
    """Seconds that one operation takes longer under a mode as those above. Measured once.

    The least of several rounds: other work on the machine only adds. What a dispatch mode costs
    is Python's, so small operations on the CPU tell.
    """
    x = torch.zeros(1)

    def round_s() -> float:
        began_s = time.perf_counter()
        for _ in range(calls):
            torch.neg(x)
        return time.perf_counter() - began_s

    def watched_s() -> float:
        with Stopwatch(time.perf_counter, lambda: True):
            return round_s()

    with torch.no_grad():
        plain_s = min(round_s() for _ in range(rounds))
        return max(min(watched_s() for _ in range(rounds)) - plain_s, 0.0) / calls
