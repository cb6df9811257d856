"""The engine as the chunked optimizer step sees it: which chunks an update group needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.bind import Binding, Family
from offload.engine import Engine
from offload.optim.mirror import OptimizerProfile
from offload.optim.mixed import Mixed
from offload.optim.state import Segment, UpdateGroup
from offload.prefetch.resident import GROUP_ELEMENTS
from offload.prefetch.trace import Access, Need, Phase
from offload.tape import Mark
from offload.tiers import vm
from offload.tiers.home import Backing, Region

_Group = tuple[tuple[Segment, ...], tuple[Need, ...]]  # what is stepped together, and its chunks


class UpdateStore:
    """Implements ``offload.optim.state.Store`` over homes.

    Elementwise optimizers are stepped chunk by chunk; others parameter by parameter, small
    neighbours together.
    """

    def __init__(
        self, engine: Engine, binding: Binding, profile: OptimizerProfile, optimizer: Optimizer
    ) -> None:
        self.phase = Phase.UPDATE
        # Gradients come home in their weights' dtype, and copies do not outlive an update.
        self.mixed: Mixed | None = None
        self._optimizer = optimizer
        self._engine = engine
        self._binding = binding
        self._profile = profile
        self._plans: list[_Group] = []
        self.replan()
        engine.outlook.largest_update_bytes = sum(
            engine.space.chunks[c].size_bytes for c in self.largest_group
        )

    def replan(self) -> None:
        """Cut the update into groups, those of weights that live on the device last."""
        residents = self._binding.residents
        self._plans.clear()
        for family in self._binding.families:
            for segments, needs in _family_groups(family, self._profile) if family.trained else ():
                homed = tuple(s for s in segments if s.param not in residents)
                if homed:
                    self._plans.append((homed, needs))
        trained = [p for p in self._profile.params if p in residents]
        self._plans += [(segments, ()) for segments in _on_device(trained, self._profile)]
        self._homed = len(self._plans)

    @property
    def largest_group(self) -> tuple[int, ...]:
        """The chunks of the group that needs most bytes at once."""
        chunks = self._engine.space.chunks
        needs = max(
            (n for _, n in self._plans),
            key=lambda needs: sum(chunks[n.chunk].size_bytes for n in needs),
            default=(),
        )
        return tuple(n.chunk for n in needs)

    def groups(self) -> Sequence[UpdateGroup]:
        del self._plans[self._homed :]
        self._plans += self._strangers()
        return [UpdateGroup(i, s) for i, (s, _) in enumerate(self._plans)]

    def _strangers(self) -> list[_Group]:
        """Parameters with a gradient but no home for it: unfrozen or added after ``wrap``.

        Their gradients and state are plain tensors, outside the budget.
        """
        groups: list[_Group] = []
        for param in (p for g in self._optimizer.param_groups for p in g["params"]):
            home = self._binding.homes.get(param)
            homed = home is not None and home.family.trained and param.numel() > 0
            if param.grad is None or homed:
                continue
            chunks = home.weight_chunks if home is not None else ()
            segment = Segment(param, 0, param.numel())
            groups.append(((segment,), tuple(Need(c, Access.WRITE) for c in chunks)))
        return groups

    def enter(self, group: UpdateGroup) -> None:
        segments, needs = self._plans[group.index]
        if any(s.param.grad is not None for s in segments):
            # Gradients that are not in their homes (everything fits, or set by hand) need none.
            live = tuple(n for n in needs if not self._engine.moves.is_dead(n.chunk))
            self._engine.need(self.phase, live)

    def enter_all(self) -> bool:
        """Have all of the update in memory, for one step of the optimizer over it, where that pays.

        It does for a fused kernel, which sweeps once and makes no temporaries: to cut for it only
        costs calls. Only for who knows that everything fits. Not where state is still to be made.
        """
        groups, known = self._optimizer.param_groups, self._profile.params
        if not all(group.get("fused") for group in groups):
            return False
        trained = [p for group in groups for p in group["params"] if p.grad is not None]
        state = self._optimizer.state
        if not all(p in known and (state.get(p) or not known[p].state) for p in trained):
            return False
        for group in self.groups():
            self.enter(group)
        return True

    def leave(self, group: UpdateGroup) -> None:
        if self._engine.tape is not None:
            self._engine.tape.mark(Mark.UPDATED)
        # The needs were WRITE: the engine takes these chunks for modified already. What is left
        # of a first step is the temporaries in which state was made; malloc would keep them.
        if self._engine.follower is None:
            vm.return_freed_memory()

    def home_of_state(
        self, param: nn.Parameter, name: str, shape: torch.Size, dtype: torch.dtype
    ) -> Tensor | None:
        home = self._binding.homes.get(param) if param not in self._binding.residents else None
        tensor = home.state(name, shape, dtype) if home is not None else None
        if home is None or tensor is None:
            return None
        # Outside a step this may be written through the mapping: then the file is the truth.
        for c in home.family.states[name].chunks_of(home.index):
            self._engine.space.trust_file(self._engine.space.chunks[c])
        return tensor


class NotedGradients:
    """Knows of which gradients it is certain that nobody wrote to them since their norm was taken.

    Certain are those that were sent to the file and have not come back, if no foreign write was
    seen since. A resident gradient may have been written through ``.data``: its norm is taken
    again, which costs a pass over memory and none over the disk.
    """

    def __init__(self, engine: Engine, binding: Binding) -> None:
        self._space = engine.space
        self._homes = binding.homes
        self._epochs: dict[nn.Parameter, int] = {}

    def then(self, note: Callable[[nn.Parameter], None]) -> Callable[[nn.Parameter], None]:
        """``note``, remembering when."""

        def noting(param: nn.Parameter) -> None:
            note(param)
            self._epochs[param] = self._space.epoch

        return noting

    def untouched(self, param: nn.Parameter) -> bool:
        home = self._homes.get(param)
        if home is None or not home.grad_is_home:
            return False
        chunks = (self._space.chunks[c] for c in home.grad_chunks)
        away = all(c.backing is Backing.FILE for c in chunks)
        return away and self._space.look() == self._epochs.get(param)


def _family_groups(family: Family, profile: OptimizerProfile) -> list[_Group]:
    if all(profile.params[p].elementwise and p.is_contiguous() for p in family.params):
        return [
            (
                tuple(
                    Segment(family.params[p.tensor], p.start, p.stop)
                    for p in family.layout.pieces(chunk)
                ),
                _needs(family, (chunk,)),
            )
            for chunk in range(family.layout.chunks)
            if family.layout.pieces(chunk)
        ]
    groups = []
    for indices in _neighbours(family):
        chunks = sorted({c for i in indices for c in family.layout.chunks_of(i)})
        segments = tuple(Segment(family.params[i], 0, family.params[i].numel()) for i in indices)
        groups.append((segments, _needs(family, tuple(chunks))))
    return groups


def _on_device(
    params: Sequence[nn.Parameter], profile: OptimizerProfile
) -> list[tuple[Segment, ...]]:
    """Groups of about so many elements, since an update's temporaries are of a group's size."""
    groups: list[list[Segment]] = []
    room = 0
    for param in params:
        numel = param.numel()
        cuts = profile.params[param].elementwise and param.is_contiguous()
        step = GROUP_ELEMENTS if cuts else max(numel, 1)
        for start in range(0, numel, step):
            segment = Segment(param, start, min(start + step, numel))
            size = segment.stop - segment.start
            if room < size or not groups:
                groups.append([])
                room = GROUP_ELEMENTS
            groups[-1].append(segment)
            room -= size
    return [tuple(group) for group in groups]


def _neighbours(family: Family) -> list[list[int]]:
    """Parameters in order, together while they end within the chunk in which the first starts."""
    runs: list[list[int]] = []
    for i in range(len(family.params)):
        chunks = family.layout.chunks_of(i)
        if runs and chunks[-1] == family.layout.chunks_of(runs[-1][0])[0]:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _needs(family: Family, chunks: tuple[int, ...]) -> tuple[Need, ...]:
    def of(region: Region | None, access: Access) -> list[Need]:
        if region is None:
            return []
        return [Need(region.chunk_ids.start + c, access) for c in chunks]

    needs = of(family.weights, Access.WRITE) + of(family.grads, Access.READ)
    for region in family.states.values():
        needs += of(region, Access.WRITE)
    return tuple(needs)
