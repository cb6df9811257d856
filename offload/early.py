"""Update during the backward pass: a group of chunks as soon as all its gradients are there.

Gradients then never touch the disk, and a weight that was fetched for the backward pass is
updated in the same visit: 7 P bytes a step instead of 10 P for Adam (bench/traffic.py). The
user allows it (``step_in_backward``), because between ``backward()`` and ``step()`` there are no
gradients to look at. The first step is run the plain way: it shows which parameters receive
exactly one gradient per step, and only those are updated early.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from offload.bind import Binding, Home
from offload.engine import Engine
from offload.errors import OffloadError
from offload.ledger import Other
from offload.optim.state import UpdateGroup
from offload.optim.step import ChunkedStep
from offload.prefetch.trace import Phase
from offload.steps import Kind, Steps
from offload.tiers.spec import format_size
from offload.update import UpdateStore


class EarlyUpdate:
    """Counts gradients as they arrive and has complete groups stepped.

    ``active`` from the second step on. Until then, and within ``paused``, gradients go home.
    """

    def __init__(
        self, engine: Engine, binding: Binding, store: UpdateStore, say: Callable[[str], None]
    ) -> None:
        self.active = False
        self.stepper: ChunkedStep | None = None
        self._engine = engine
        self._binding = binding
        self._store = store
        self._say = say
        self._paused = self._declined = False
        self._arrivals: Counter[nn.Parameter] = Counter()  # of the first step
        self._board = _Board([], set())
        self._kept: dict[nn.Parameter, int] = {}  # bytes of gradients that wait where they are

    # -- while gradients arrive -------------------------------------------------------------

    def keeps(self, home: Home) -> bool:
        """Whether a gradient that has just been made is used up where it is, and needs no home."""
        return self.active and not self._paused and home.param in self._board.expected

    def arrived(self, param: nn.Parameter) -> None:
        """Autograd has added up a parameter's gradient. Raises OffloadError for a second one."""
        if self._paused:
            return
        if not self.active:
            self._arrivals[param] += 1
            return
        home = self._binding.homes[param]
        if self._board.has(param):
            raise OffloadError(
                f"{home.name} received a second gradient after its update in this backward pass. "
                "For several backward passes per step put all but the last into `with "
                "offload.runtime(model).accumulating():`, or wrap without step_in_backward; "
                "weights are now between two steps: go on from the last checkpoint"
            )
        if param not in self._board.expected:
            return
        resident = param in self._binding.residents
        if not home.grad_is_home and not resident:  # handed on by whoever debited it until now
            what = f"the gradient of {home.name}"
            self._engine.take_other(home.size_bytes, what, Other.GRADIENTS)
            self._kept[param] = home.size_bytes
        for group in self._board.arrive(param):
            self._step(group)

    def _step(self, group: UpdateGroup) -> None:
        assert self.stepper is not None
        self._store.phase = Phase.EARLY
        try:
            self.stepper.step_ahead(group)
        finally:
            self._store.phase = Phase.UPDATE
        for param in self._board.stepped(group):
            param.grad = None
            self._engine.ledger.give_other(self._kept.pop(param, 0), Other.GRADIENTS)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Backward passes in here add to gradients; the first one after it updates."""
        self.refuse_between_steps("accumulating()")
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def hold(self, *, held: bool) -> None:
        """Within ``paused``: whether the pass that goes on now must not update yet."""
        self._paused = held

    # -- between steps ----------------------------------------------------------------------

    def refuse_between_steps(self, what: str) -> None:
        """Raise OffloadError while some weights are updated and others are not."""
        if self.stepper is not None and self.stepper.is_ahead:
            raise OffloadError(
                f"{what}: an update was begun in the backward pass and is not finished; call "
                "optimizer.step() first (after an error in backward(): load a checkpoint)"
            )

    def reset(self) -> None:
        """Forget an update that was begun: a checkpoint is about to be loaded."""
        for param, size_bytes in self._kept.items():
            self._engine.ledger.give_other(size_bytes, Other.GRADIENTS)
            param.grad = None
        self._kept.clear()
        self._board = self._board.again()
        if self.stepper is not None:
            self.stepper.forget_ahead()

    def renew(self) -> None:
        """Groups are others from now on: weights moved to the device, or came back."""
        if self.active:
            expected = self._board.expected
            groups = self._store.groups()
            self._board = _Board([g for g in groups if expected & {s.param for s in g.segments}],
                                 expected)  # fmt: skip

    def end_step(self, steps: Steps) -> None:
        """``optimizer.step()`` is over: after the first one, decide whether to go on early."""
        if self.active:
            # Of incomplete groups: gradients stay to be seen.
            self._engine.ledger.give_other(sum(self._kept.values()), Other.GRADIENTS)
            self._kept.clear()
            self._board = self._board.again()
        elif self._arrivals and not self._declined and not steps.fits(Kind.TRAIN):
            self._decide(steps)
            self._declined = not self.active
        self._arrivals.clear()

    def _decide(self, steps: Steps) -> None:
        once = {p for p, n in self._arrivals.items() if n == 1 and p in self._binding.homes}
        often = [self._binding.homes[p].name for p, n in self._arrivals.items() if n > 1]
        groups = [g for g in self._store.groups() if any(s.param in once for s in g.segments)]
        lacking_bytes = self._needed_bytes(steps) - self._engine.ledger.capacity_bytes
        if not groups or len(often) > len(once):
            self._say(
                f"step_in_backward is off: {len(often)} parameters ({', '.join(often[:3])}...) "
                "received several gradients in one step; put all but the last backward pass into "
                "`with offload.runtime(model).accumulating():`"
            )
        elif lacking_bytes > 0:
            self._say(
                "step_in_backward is off: activations and one update together need "
                f"{format_size(lacking_bytes)} more host_memory"
            )
        else:
            self._board = _Board(groups, once)
            self.active = True
            steps.forget(Kind.TRAIN)  # a step looks different from now on

    def _needed_bytes(self, steps: Steps) -> int:
        """Room for an update at the worst moment of the backward pass."""
        trace = steps.tracks[Kind.TRAIN].trace
        moments = trace.moments if trace is not None else ()
        other_bytes = max((m.other_bytes for m in moments if m.phase.in_backward), default=0)
        chunks = self._engine.space.chunks
        sizes = [chunks[c].size_bytes for c in self._store.largest_group]
        # Its gradients need no chunk, but two that are not complete yet may wait.
        return other_bytes + sum(sizes) + max(sizes, default=0)


class _Board:
    """What one step still waits for: groups for gradients, parameters for groups."""

    def __init__(self, groups: list[UpdateGroup], expected: set[nn.Parameter]) -> None:
        self.expected = expected
        self._groups = groups
        self._of: defaultdict[nn.Parameter, list[int]] = defaultdict(list)
        self._missing: list[set[nn.Parameter]] = []
        for i, group in enumerate(groups):
            self._missing.append({s.param for s in group.segments} & expected)
            for param in self._missing[-1]:
                self._of[param].append(i)
        self._left = {p: len(of) for p, of in self._of.items()}
        self._here: set[nn.Parameter] = set()

    def again(self) -> _Board:
        """The board of the next step."""
        return _Board(self._groups, self.expected)

    def has(self, param: nn.Parameter) -> bool:
        """Whether this parameter's gradient has arrived in this step."""
        return param in self._here

    def arrive(self, param: nn.Parameter) -> list[UpdateGroup]:
        """Groups that are complete with this parameter's gradient."""
        self._here.add(param)
        for i in self._of[param]:
            self._missing[i].discard(param)
        return [self._groups[i] for i in self._of[param] if not self._missing[i]]

    def stepped(self, group: UpdateGroup) -> list[nn.Parameter]:
        """Parameters of which the last group is this one: their gradients are used up."""
        done = []
        for param in {s.param: None for s in group.segments}:
            if param in self.expected:
                self._left[param] -= 1
                if not self._left[param]:
                    done.append(param)
        return done
