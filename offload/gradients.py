"""Gradients on their way home: room while autograd holds them, then into their chunks.

Both ways to compute (`hooks`: where the weights are; `device_hooks`: in frames) end here, since
gradients live on the host in either.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from offload.bind import Binding, Home
from offload.engine import Engine
from offload.errors import OffloadError
from offload.ledger import Other
from offload.prefetch.trace import Access, Need, Phase
from offload.tape import Mark


class GradientHomes:
    """What happens before and after autograd adds a gradient to ``.grad``.

    ``on_grad`` is told of each parameter afterwards; gradients for which ``keeps`` is true are
    used up where they are and do not go home. ``shared`` are trained parameters that several
    modules hold (tied weights). ``whose``: tells apart backward passes that go on side by side.
    """

    def __init__(
        self, model: nn.Module, engine: Engine, binding: Binding,
        on_grad: Callable[[nn.Parameter], None] | None,
        keeps: Callable[[Home], bool],
        whose: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._binding = binding
        self._on_grad = on_grad
        self._keeps = keeps
        self._foreign: set[Home] = set()  # ``.grad`` is the user's own: autograd adds in place
        self._coming: set[Home] = set()  # debited before autograd has them
        self._whose = whose
        self._in_flight: dict[tuple[object, Home], int] = {}  # bytes that autograd holds, debited
        trained = [home for home in binding.homes.values() if home.family.trained]
        several = shared_params(model)
        self.shared = tuple(home for home in trained if home.param in several)
        engine.outlook.largest_gradient_bytes = max(map(gradient_bytes, trained), default=0)

    def before(self, home: Home, grad: Tensor) -> None:
        """Autograd is about to add ``grad``. Raises BudgetError; OffloadError where sparse."""
        if grad.is_sparse:
            raise OffloadError(
                f"{home.name} has a sparse gradient, which has no home: build the embedding "
                "with sparse=False"
            )
        if self._engine.tape is not None:
            self._engine.tape.mark(Mark.GRADIENT, home.name)
        if home.param in self._binding.residents:
            return  # it stays where it is made
        self._foreign.discard(home)
        if home.param.grad is not None and not home.grad_is_home:
            self._foreign.add(home)
        if home in self._coming:
            self._coming.discard(home)
        else:
            self._take(home)
        if home.grad_is_home:  # about to be added to in place
            needs = tuple(Need(c, Access.WRITE) for c in home.grad_chunks)
            self._engine.need(Phase.BACKWARD, needs)

    def after(self, home: Home) -> None:
        """Autograd has added it."""
        grad = home.param.grad if home.param not in self._binding.residents else None
        made = grad is not None and home not in self._foreign and not home.grad_is_home
        if made and not home.has_come(grad) and not self._keeps(home):
            settle_gradient(self._engine, self._binding, home)
        self._foreign.discard(home)
        self._give(home)
        if self._on_grad is not None:
            self._on_grad(home.param)

    def reached(self, home: Home) -> None:
        """The backward pass is at a use of this parameter. Raises BudgetError.

        Autograd keeps a shared weight's first gradient until its last use is reached.
        """
        there = (self._whose(), home) in self._in_flight
        if home in self.shared and not there and home.param.requires_grad:
            self._take(home)

    def comes(self, home: Home) -> None:
        """Its one gradient is on its way, into memory that is there from now. BudgetError."""
        self._take(home)
        self._coming.add(home)

    def nothing_in_flight(self, *, only_mine: bool = False) -> None:
        """No backward pass is under way (``autograd.grad`` never brings gradients home)."""
        mine = self._whose()
        self._coming.clear()
        for whose, home in list(self._in_flight):
            if whose == mine or not only_mine:
                self._credit(self._in_flight.pop((whose, home)))

    def _take(self, home: Home) -> None:
        """One gradient tensor of this parameter exists (more)."""
        size_bytes = gradient_bytes(home)
        self._engine.take_other(size_bytes, f"the gradient of {home.name}", Other.GRADIENTS)
        key = self._whose(), home
        self._in_flight[key] = self._in_flight.get(key, 0) + size_bytes

    def _give(self, home: Home) -> None:
        """They are home, or gone."""
        self._credit(self._in_flight.pop((self._whose(), home), 0))

    def _credit(self, size_bytes: int) -> None:
        self._engine.ledger.give_other(size_bytes, Other.GRADIENTS)


def gradient_bytes(home: Home) -> int:
    """Of one gradient tensor; the parameter may have been given data of another dtype."""
    return home.param.numel() * home.param.element_size()


def shared_params(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that several modules hold."""
    holders: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            holders[param] = holders.get(param, 0) + 1
    return {p for p, n in holders.items() if n > 1}


def settle_gradient(engine: Engine, binding: Binding, home: Home) -> None:
    """Move a gradient that autograd has just made into its home; ``.grad`` is then the home."""
    made = home.param.grad
    region = home.family.grads
    assert made is not None
    assert region is not None
    if made.nbytes != home.size_bytes:  # the parameter was given other data than it was homed with
        return
    if home.grad_is_held:  # the user kept last step's tensor or a view: the home is taken
        return
    # A chunk of cleared gradients need not be read. Decided before the new tensor makes it live.
    access = {c: Access.FRESH if binding.is_dead(c) else Access.WRITE for c in home.grad_chunks}
    target = home.new_grad()
    split = len(home.grad_chunks) > 1 and target.is_contiguous() and made.is_contiguous()
    groups = [(c,) for c in home.grad_chunks] if split else [home.grad_chunks]
    start = region.layout.starts[home.index]
    home.param.grad = target
    for group in groups:
        engine.need(Phase.BACKWARD, tuple(Need(c, access[c]) for c in group))
        if split:
            lo, hi = region.layout.chunk_range(group[0] - region.chunk_ids.start)
            a, b = max(lo - start, 0), min(hi - start, target.numel())
            target.view(-1)[a:b].copy_(made.view(-1)[a:b])
        else:
            target.copy_(made)
