"""Saved tensors and repeated blocks of a model whose weights are in frames.

What becomes of activations is decided by offload/activations.py, as without frames; here is what
differs. Saved weights are places in chunks, a unit that runs again reads its weights from frames,
and whatever touches residency is under the lock of the pass. A rerun itself is not: it is the
user's code, and takes long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from offload.activations import Planned, Ways, find_units
from offload.device_side import Device
from offload.framed_pass import FramedPass
from offload.guard import AllocationGuard
from offload.hook import Hook, has_user_hooks
from offload.hooks import REMEDY
from offload.prefetch.trace import Phase
from offload.rerun import Dropped
from offload.results import Keeping
from offload.saved import Activations, Packed
from offload.site import Site
from offload.steps import Kind, Steps
from offload.use import SavedInFrames


class FramedUnits:
    """Those of one model. ``enter_backward`` is to be called before anything of a backward pass."""

    def __init__(
        self, model: nn.Module, device: Device, ways: Ways, here: FramedPass,
        enter_backward: Callable[[], None],
    ) -> None:  # fmt: skip
        self._device = device
        self._here = here
        self._enter_backward = enter_backward
        engine = device.engine
        activations = Activations(self._take, engine.given_back.append)
        self._saved = SavedInFrames(
            engine.frames, self._fetch, activations, here.running, device.save_here
        )
        site = Site(
            activations, self._saved, device.place, self._again, has_user_hooks,
            lambda: not here.ours(),
        )  # fmt: skip
        engine.tenants.join(engine.noticed)  # before the one whose transfers let go of memory
        self.planned = Planned(engine, ways, site)
        units = find_units(model)
        if ways.setting == "keep":
            if units:
                engine.outlook.remedy = REMEDY
            units = {}
        self._count = len(units)
        self._handles = [h for name, unit in units.items() for h in self._hooks(name, unit)]

    def close(self) -> None:
        """Take hooks off, end transfers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        with self._here.lock:
            self.planned.close()
            self._device.engine.tenants.leave(self._device.engine.noticed)

    @property
    def any(self) -> bool:
        """Whether there are units whose activations are treated otherwise than kept."""
        return self._count > 0

    # -- passes -----------------------------------------------------------------------------

    def decide(self, levels: tuple[Steps, ...]) -> None:
        """Between steps: where activations are to be treated otherwise the step is recorded."""
        if self.planned.wants_another_record(self._device.steps.tracks[Kind.TRAIN].trace):
            for steps in levels:
                steps.forget(Kind.TRAIN)

    def begin_pass(self, elements: int) -> None:
        """A forward pass with gradients begins, over so many elements of input."""
        self.planned.begin_pass(elements, self._count)

    def show_results(self) -> None:
        """Where results of single operations are to be kept, see them during the forward pass."""
        if self.planned.keeps_parts:
            self._here.push(Keeping(self._saved, self._here.computing))

    def _hooks(self, name: str, unit: nn.Module) -> list[RemovableHandle]:
        """Hooks that tell when a unit's forward runs, as close around it as there are."""

        def before(module: nn.Module, args: object, kwargs: object) -> None:
            if self._here.running():
                with self._here.locked():
                    self.planned.before(name, module, args, kwargs)

        def after(module: nn.Module, args: object, output: object) -> None:
            with self._here.locked():
                self.planned.after(output)

        return [
            unit.register_forward_pre_hook(Hook(before), with_kwargs=True),
            unit.register_forward_hook(Hook(after), prepend=True, always_call=True),
        ]

    # -- saved tensors ----------------------------------------------------------------------

    def pack(self, tensor: Tensor) -> Packed:
        """Autograd saves a tensor."""
        return self._saved.pack(tensor)

    def unpack(self, packed: Packed) -> Tensor:
        """Autograd is about to use it."""
        with self._here.lock:
            if packed.visit is not None:
                self._enter_backward()
                packed.visit.enter_backward()
            if not isinstance(packed, Dropped):
                return self._saved.unpack(packed)
        return packed.check()

    def _fetch(self, param: nn.Parameter) -> None:
        with self._here.lock:
            self._enter_backward()
            self._device.engine.serve(Phase.BACKWARD, param)

    def _take(self, size_bytes: int, what: str) -> None:
        with self._here.locked():
            self._device.engine.take_other(size_bytes, what)

    # -- units that run again ---------------------------------------------------------------

    @contextmanager
    def _again(self, unit: nn.Module) -> Iterator[None]:
        """Around a rerun. In a recorded step room is made for what it will allocate, as before."""
        here = self._here
        with here.lock:
            self._enter_backward()
        guard: AbstractContextManager[Any] = nullcontext()
        if here.watched:
            guard = AllocationGuard(self._foresee, lambda: not here.ours())
        with here.rerunning(), guard:
            yield

    def _foresee(self, size_bytes: int, operation: str) -> None:
        with self._here.locked():
            self._device.engine.foresee(size_bytes, f"the result of {operation}, run again,")
