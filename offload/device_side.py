"""The device level of a run as a whole: its engine, what lives there, gradients that leave."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from offload.device_engine import DeviceEngine
from offload.outgoing import Outgoing
from offload.prefetch.planner import smallest_bytes
from offload.residents import Residents
from offload.saved import Saved
from offload.steps import Kind, Steps
from offload.tape import Tape
from offload.tiers.bus import Bus
from offload.tiers.spec import GIB, format_size
from offload.watch import AllocatorWatch

UNMEASURED_BYTES_PER_S = 8.0 * GIB  # a copy's rate, until a recorded step has measured it


@dataclass(slots=True, eq=False)
class Device:
    """The device level of a run.

    ``dtype``: of floating weights in frames; None: as in their homes. ``trust_versions``: copies
    outlive passes, since the user promises that writes to weights go through autograd's versions.
    """

    place: torch.device
    dtype: torch.dtype | None
    engine: DeviceEngine
    steps: Steps
    trust_versions: bool = False
    settles: bool = False  # weights may come to live there; see offload.residents
    outgoing: Outgoing | None = None  # gradients leave beside the backward pass
    residents: Residents | None = None  # weights that live on the device
    bus: Bus | None = None  # to memory of the device's own
    aside_bytes: int = 0  # beyond the budget, what watched steps were seen and said to take
    extent: int = 0  # of the largest input so far of a pass with gradients
    saved_bytes: int = 0  # of activations after such a pass, at most

    def save_here(self, tensor: Tensor) -> Saved | None:
        """What autograd holds in place of a weight that lives on the device; None: it is none."""
        if self.residents is None or not self.residents.holds(tensor):
            return None
        return self.residents.save(tensor)

    def settle_residents(self, host: Steps, extent: int = 0) -> None:
        """A pass begins. Between steps, weights come for which the last step left room.

        ``extent``: of its input; 0: the pass is without gradients.
        """
        residents = self.residents
        if residents is None:
            return
        residents.begin_pass()
        self._make_way(residents, extent)
        if host.current is None:
            trace = self.steps.tracks[residents.kind].trace
            if trace is not None and not residents.chunks:
                self.engine.retire()  # frames that outlive passes hold the room
                residents.consider(trace, host.tracks[residents.kind].trace, self._up_bytes_per_s())
            if residents.take_moved():
                for steps, kind in product((host, self.steps), Kind):
                    steps.forget(kind)

    def _make_way(self, residents: Residents, extent: int) -> None:
        """Send home, while no graph holds it, what a larger input than ever will need the room of:
        what is not weights is taken to grow with it. And what an earlier pass had to leave here.
        """
        before, self.extent = self.extent, max(self.extent, extent)
        other_bytes = 0
        if 0 < before < extent:
            seen_bytes = self.saved_bytes + self.engine.passing_bytes
            other_bytes = seen_bytes * extent // before
        while residents.owes or (other_bytes and not residents.leave_room(other_bytes)):
            if not self.engine.give_up():
                return

    def leave_forward(self) -> None:
        """A pass with gradients has saved what it saves."""
        self.saved_bytes = max(self.saved_bytes, self.engine.ledger.other_bytes)

    def may_update_at_once(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer may step by itself: all it trains, and its temporaries, fit here.

        Those of a foreach step are about twice its weights; a fused one has none.
        """
        if self.residents is None or not self.residents.complete:
            return False
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if not all(self.residents.has(p) for p in params):
            return False
        fused = all(group.get("fused") for group in optimizer.param_groups)
        temporaries_bytes = 0 if fused else 2 * sum(p.nbytes for p in params)
        return temporaries_bytes <= self.engine.ledger.room_bytes

    def _up_bytes_per_s(self) -> float:
        meter = self.engine.frames.lanes["read"].meter
        return meter.moved_bytes / meter.busy_s if meter.busy_s else UNMEASURED_BYTES_PER_S

    def end_pass(self) -> None:
        """User code runs from here."""
        self.engine.frames.scrutiny.watching = False
        if self.residents is not None:
            self.residents.end_pass()
        if not self.trust_versions:
            self.engine.retire()

    def end_step(self) -> None:
        """The update begins: every copy is about to be outdated."""
        if self.residents is not None:
            self.residents.end_step()
        self.engine.retire()
        self.steps.end()
        self._set_aside_excess()

    def present_bytes(self) -> int:
        """What the ledger knows of, without what it has debited for the next step to make."""
        self.engine.collect()
        coming_bytes = self.residents.coming_bytes if self.residents is not None else 0
        return self.engine.ledger.used_bytes - coming_bytes

    def _set_aside_excess(self) -> None:
        """What a watched step took beyond the budget is kept free from now on, and that is said.

        What the step itself cannot do without is not: it would never run again.
        """
        ledger, watch = self.engine.ledger, self.steps.watch
        if not isinstance(watch, AllocatorWatch):
            return
        over_bytes = watch.held_bytes - ledger.budget_bytes - self.aside_bytes
        if over_bytes <= 0:
            return
        free_bytes = min(over_bytes, self._spare_bytes())
        self.aside_bytes += over_bytes
        ledger.fixed_bytes += free_bytes
        print(
            f"offload: a watched step took {format_size(over_bytes)} more of {self.place} than "
            "device_memory, in operations that nobody can look into; "
            f"{format_size(free_bytes)} is kept free for them from now on",
            file=sys.stderr,
        )

    def _spare_bytes(self) -> int:
        """Room that training steps, as recorded, do not need, were all weights to go home."""
        residents = self.residents
        traces = (self.steps.tracks[Kind.TRAIN].trace, residents.seen if residents else None)
        least_bytes = max((smallest_bytes(t) for t in traces if t and t.moments), default=0)
        resident_bytes = residents.bytes if residents else 0
        return max(self.engine.ledger.capacity_bytes + resident_bytes - least_bytes, 0)

    def settle_sent(self, tape: Tape | None) -> None:
        """Gradients that have been awaited take no device memory any more."""
        for start_s, end_s, size_bytes in self.outgoing.over() if self.outgoing else ():
            self.engine.ledger.give_other(size_bytes)
            if tape is not None:
                tape.copied("d2h", start_s, size_bytes, end_s)

    def await_sent(self, tape: Tape | None) -> None:
        """A backward pass ends: no gradient is on its way any more. Raises what a copy raised."""
        if self.outgoing is not None:
            self.outgoing.wait_all()
        self.settle_sent(tape)

    def abandon_sent(self, tape: Tape | None) -> None:
        """Outside of backward passes: what is on its way is of one that was cut short."""
        if self.outgoing is not None:
            self.outgoing.abandon_all()
        self.settle_sent(tape)

    def tier_stats(self) -> dict[str, int]:
        """Bytes held on the device."""
        ledger = self.engine.ledger
        return {
            "budget_bytes": ledger.budget_bytes,
            "used_bytes": ledger.used_bytes,
            "peak_bytes": ledger.peak_bytes,
            "peak_other_bytes": ledger.peak_other_bytes,
            "resident_bytes": self.residents.bytes if self.residents is not None else 0,
        }

    def stats(self, kind: Kind) -> dict[str, Any]:
        """What the copies to the device did; see docs/stats.md."""
        counters, forecast = self.engine.counters, self.steps.tracks[kind].forecast
        meter = self.engine.frames.lanes["read"].meter
        down = self.outgoing.lane.meter if self.outgoing is not None else None
        return {
            "uploaded_bytes": meter.moved_bytes,
            "busy_s": meter.busy_s,
            "pinned_bytes": self.engine.frames.pinned_bytes,
            "downloaded_bytes": down.moved_bytes if down is not None else 0,
            "download_busy_s": down.busy_s if down is not None else 0.0,
            "stall_s": counters.stall_s["read"],
            "demand_uploads": counters.demand_loads,
            "planned_uploads": counters.planned_loads,
            "forced_evictions": counters.forced_evictions,
            "forecast": asdict(forecast) if forecast is not None else None,
        }

    def close(self) -> None:
        """Free the frames and stop the lanes."""
        self.abandon_sent(None)
        if self.outgoing is not None:
            self.outgoing.lane.close()
        self.engine.retire()
        self.engine.frames.close()
