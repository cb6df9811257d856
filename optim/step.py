"""Drive the user's own optimizer, group of chunks by group of chunks, from its public hooks.

A step pre-hook hands torch a shadow with empty parameter groups and a closure that runs the
user's closure and then the chunk loop. So the user's class, flags, hooks, schedulers and
GradScaler see one ordinary step, and the real optimizer's groups are never touched: whatever
raises, there is nothing to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from offload.errors import OffloadError
from offload.optim import mirror
from offload.optim.clip import GradNorms
from offload.optim.codecs import BLOCK_ELEMENTS
from offload.optim.groups import GroupLedger, raw_step
from offload.optim.mirror import OptimizerProfile
from offload.optim.mixed import Workspace
from offload.optim.narrow import (
    COUNTER,
    Narrowing,
    refuse_steps_over_narrowed,
    show_in_state_dict,
    widen_state,
)
from offload.optim.pieces import (
    ALIGN_ELEMENTS,
    Piece,
    Sizes,
    Source,
    StateMerge,
    batches,
    check_grad,
    check_segment,
    cut,
    flatten,
)
from offload.optim.state import Segment, StateHomes, Store, UpdateGroup

# A weight, its gradient and two moments of this many float32 are 4 MiB: they stay in the cache
# while a for-loop optimizer sweeps over them. Measured by bench/update.py.
PIECE_ELEMENTS = 1 << 18
# Copies that a step needs (clipped gradients, state being made) exist for this many pieces at once.
PIECES_WITH_COPIES = 4


@dataclass(frozen=True, slots=True)
class Clip:
    """Clip the gradients of ``params``, in this order, to a total L2 norm of ``max_norm``.

    The gradients themselves stay as they are; the update sees them clipped.
    """

    max_norm: float
    params: tuple[nn.Parameter, ...]
    norms: GradNorms = field(default_factory=GradNorms)


@dataclass(slots=True, eq=False)
class _Run:
    """What one step carries from group to group."""

    ledger: GroupLedger
    group_of: dict[nn.Parameter, int]
    coefficient: Tensor | None
    merges: dict[nn.Parameter, StateMerge] = field(default_factory=dict)
    done: set[tuple[int, nn.Parameter]] = field(default_factory=set)  # segments stepped ahead


class ChunkedStep:
    """``optimizer.step()`` over state that lives in ``store``, same bits, until `close`."""

    def __init__(
        self,
        optimizer: Optimizer,
        profile: OptimizerProfile,
        store: Store,
        *,
        clip: Clip | None = None,
        narrowing: Narrowing | None = None,
        piece_elements: int = PIECE_ELEMENTS,
        leave: Callable[[], bool] = lambda: False,
    ) -> None:
        """Install the hooks and move state that exists already into its homes.

        With ``clip`` the gradients are scaled on their way through the update and stay as they
        are in ``p.grad``. ``leave``: whether everything is where the optimizer can step it by
        itself, all at once. Raises ValueError for a piece size that is not a multiple of 64; of
        256, where state is narrowed; for ``clip`` over a store with gradients of its own.
        """
        if clip is not None and store.mixed is not None:
            raise ValueError("clip takes norms of p.grad: whoever keeps other gradients clips them")
        unit = BLOCK_ELEMENTS if narrowing else 4 * ALIGN_ELEMENTS
        if piece_elements <= 0 or piece_elements % unit:
            raise ValueError(f"piece_elements must be a multiple of {unit}, got {piece_elements}")
        self.last_total_norm: Tensor | None = None  # [], of the last clipped step
        self._optimizer = optimizer
        self._profile = profile
        self._store = store
        self._clip = clip
        self._leave = leave
        self._workspace = Workspace(piece_elements, PIECES_WITH_COPIES + 1)
        self._homes = StateHomes(optimizer, store, narrowing or Narrowing())
        self._open: tuple[GroupLedger, Optimizer] | None = None
        self._ahead: _Run | None = None  # a step that was begun before it was asked for
        self._homes.adopt()
        show_in_state_dict(self.narrowing, optimizer)
        self._handles: tuple[RemovableHandle, ...] = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_load_state_dict_post_hook(lambda _: self._homes.adopt()),
        )

    @property
    def narrowing(self) -> Narrowing:
        """How state is stored."""
        return self._homes.narrowing

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped on their way through the update."""
        return self._clip is not None

    def adopt_state(self) -> None:
        """Have state that is not in its home moved into it."""
        self._homes.adopt()

    def widen_state(self) -> None:
        """Give the optimizer plain state of its own dtypes; all of it must fit in memory."""
        widen_state(self.narrowing, self._optimizer)

    def close(self) -> None:
        """Remove the hooks: the optimizer steps as torch wrote it. State stays in its homes.

        Narrowed state stays narrow, which the optimizer cannot step: it refuses to, until other
        state is loaded. See `widen_state`.
        """
        for handle in self._handles:
            handle.remove()
        refuse_steps_over_narrowed(self.narrowing, self._optimizer)

    @torch.no_grad()
    def step_ahead(self, group: UpdateGroup) -> None:
        """Step what has a gradient in one group now; the next ``optimizer.step()`` leaves it out.

        The caller takes care that those gradients are final, and that a step follows.
        """
        if self._ahead is None:
            self._homes.adopt()
            self._ahead = self._new_run(None)
        with_grad = [s.param for s in group.segments if self._gradient(s.param) is not None]
        self._run_group(group, self._ahead)
        self._ahead.done.update((group.index, p) for p in with_grad)

    @property
    def is_ahead(self) -> bool:
        """Whether a step was begun that ``optimizer.step()`` has not finished yet."""
        return self._ahead is not None

    def forget_ahead(self) -> None:
        """Give up a step that was begun ahead: weights and state are about to be replaced."""
        self._ahead = None

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._open = None
        if self._clip is None and self._ahead is None and self._leave():
            self._homes.adopt()
            return args, kwargs  # torch's own step
        empty = GroupLedger(optimizer).open({}, {})
        if not self._profile.calls_closure:
            self._update(empty)
            return (empty, *args[1:]), kwargs
        user = args[1] if len(args) > 1 else kwargs.get("closure")
        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (empty, self._closure(user, empty), *args[2:]), rest

    def _closure(self, user: Callable[[], Any] | None, empty: Optimizer) -> Callable[[], Any]:
        def run() -> Any:
            loss = None
            if user is not None:
                with torch.enable_grad():
                    loss = user()
            self._update(empty)
            return loss

        return run

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is not None:
            ledger, empty = self._open
            ledger.commit_untouched(empty)
            self._open = None

    @torch.no_grad()
    def _update(self, empty: Optimizer) -> None:
        """The chunk loop. ``empty`` is the shadow that torch steps afterwards."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.ledger.check_unchanged()
        run = ahead or self._new_run(self._coefficient())
        groups = self._store.groups()
        self._check_cover(groups, run.group_of)
        self._homes.adopt()
        for group in groups:
            self._run_group(group, run)
        run.ledger.commit()
        self.narrowing.count(self._optimizer)
        empty.param_groups = run.ledger.open({}, {}).param_groups
        self._open = (run.ledger, empty)

    def _new_run(self, coefficient: Tensor | None) -> _Run:
        group_of = {p: i for i, g in enumerate(self._optimizer.param_groups) for p in g["params"]}
        if not group_of.keys() <= self._profile.params.keys():
            seen = self.narrowing.as_learnt(self._optimizer)
            self._profile = mirror.profile(seen)  # add_param_group
        return _Run(GroupLedger(self._optimizer), group_of, coefficient)

    def _run_group(self, group: UpdateGroup, run: _Run) -> None:
        versions = {s.param: s.param._version for s in group.segments}
        self._store.enter(group)
        try:
            self._step_group(group, run)
        finally:
            self._store.leave(group)
        for param, version in versions.items():
            if param in run.merges and param._version == version:  # fused CPU kernels forget to
                torch.autograd.graph.increment_version(param)

    def _coefficient(self) -> Tensor | None:
        if self._clip is None:
            return None
        if getattr(self._optimizer, "grad_scale", None) is not None:
            raise OffloadError(
                "max_grad_norm needs unscaled gradients: call scaler.unscale_(optimizer) before "
                "scaler.step(optimizer)"
            )
        clip = self._clip
        self.last_total_norm, coefficient = clip.norms.coefficient(clip.params, clip.max_norm)
        return coefficient

    def _step_group(self, group: UpdateGroup, run: _Run) -> None:
        """Step the resident segments of one group, in batches of pieces."""
        segments = [s for s in group.segments if (group.index, s.param) not in run.done]
        sources = [s for segment in segments if (s := self._source(segment, run))]
        pieces = [piece for source in sources for piece in cut(source)]
        limits = [n for s in sources if (n := s.sizes.call_elements) is not None]
        for batch in batches(pieces, min(limits, default=None)):
            self._step_batch(batch, run)

    def _source(self, segment: Segment, run: _Run) -> Source | None:
        """What there is to step in a resident segment; None without a gradient."""
        param, grad = segment.param, self._gradient(segment.param)
        index = run.group_of.get(param)
        if index is None or grad is None:
            return None
        known = self._profile.params[param]
        check_segment(segment, known.elementwise)
        check_grad(param, grad)
        entries = self._optimizer.state.get(param, {})
        options = self._optimizer.param_groups[index]
        narrow = bool(self.narrowing.of(param))
        copies = run.coefficient is not None or (not entries and bool(known.state))
        sizes = self._sizes(options, grad, copies)
        if not known.elementwise:
            sizes = Sizes(None, sizes.call_elements)
        source = Source(segment, index, grad, entries, sizes, known.element_names)
        source.converts = self._store.mixed is not None and grad.dtype != param.dtype
        if narrow:  # one piece a call: what it is widened into stays in the cache and is reused
            source.sizes = Sizes(*[self._workspace.piece_elements] * 2)
            source.step = options.get(COUNTER, 0)
            source.kept = self.narrowing.kept(param, entries, source.step)
            source.entries = self.narrowing.others(source.kept, entries)
        flatten(source)
        return source

    def _sizes(self, group: Mapping[str, Any], grad: Tensor, copies: bool) -> Sizes:
        """How finely to cut.

        A fused kernel sweeps once and an accelerator has no such cache, so cutting buys them
        nothing. A foreach optimizer sweeps over all tensors of a call before the next
        operation: one piece a call. Copies (see PIECES_WITH_COPIES) bound all of them, and what
        is converted before and after the kernel's sweep (see `mixed`) has to be in the cache.
        """
        piece_elements, foreach = self._workspace.piece_elements, bool(group.get("foreach"))
        fused = bool(group.get("fused"))
        if copies or (self._store.mixed is not None and grad.is_cpu):
            limit = piece_elements * (1 if foreach else PIECES_WITH_COPIES)
            # A little more, so that a bias is no call of its own between two long weights.
            return Sizes(limit if fused else piece_elements, limit + piece_elements // 2)
        if fused or not grad.is_cpu:
            return Sizes(None, None)
        return Sizes(piece_elements, piece_elements if foreach else None)

    def _step_batch(self, batch: list[Piece], run: _Run) -> None:
        """One call of the user's own step over a few pieces."""
        params: dict[int, list[Tensor]] = {}
        self._workspace.clear()
        for piece in batch:
            piece.prepare(run.coefficient, self._workspace)
            params.setdefault(piece.source.group, []).append(piece.tensor)
        if not params:
            return
        # Copied: a step may put another tensor in its place, which has to be seen.
        twin = run.ledger.open(params, {piece.tensor: dict(piece.state) for piece in batch})
        raw_step(type(twin))(twin)
        state = twin.state
        run.ledger.close(twin, params)
        for piece in batch:
            param = piece.source.segment.param
            if self._store.mixed is not None:
                self._store.mixed.stepped(param, piece.start, piece.tensor)
            if param not in run.merges:
                run.merges[param] = StateMerge(param, self._homes)
            if run.merges[param].absorb(piece, state.get(piece.tensor, {})):
                run.merges[param].commit(self._optimizer.state)

    def _gradient(self, param: nn.Parameter) -> Tensor | None:
        mixed = self._store.mixed
        return param.grad if mixed is None else mixed.gradient(param)

    def _check_cover(
        self, groups: Sequence[UpdateGroup], group_of: dict[nn.Parameter, int]
    ) -> None:
        """Raise OffloadError where a parameter would be updated in part, twice or not at all."""
        covered = {p: 0 for p in group_of if self._gradient(p) is not None}
        for group in groups:
            for segment in group.segments:
                if segment.param in covered:
                    covered[segment.param] += segment.stop - segment.start
        for param, elements in covered.items():
            if elements != param.numel():
                raise OffloadError(
                    f"{elements} of {param.numel()} elements of a parameter of shape "
                    f"{tuple(param.shape)} are in the update: wrap the model again after adding "
                    "parameters to its optimizer"
                )
