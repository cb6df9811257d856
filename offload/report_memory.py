"""What each tier held while a step ran, by kind: the columns of the report's memory charts.

The kinds are counted from what changed, the used bytes are the ledger's own at the same moment;
that both agree in every sample is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from offload.ledger import Other
from offload.parts import Parts
from offload.report_tables import GRADIENTS, OPTIMIZER, WEIGHTS, Tables
from offload.tape import Sample, Tape

FIXED = "fixed"
KINDS = (
    WEIGHTS, GRADIENTS, OPTIMIZER, Other.ACTIVATIONS.value, Other.KV.value, Other.STAGING.value,
    FIXED,
)  # fmt: skip
MOST_SAMPLES = 3000  # of a tier


class Columns:
    """Samples of one tier: seconds, bytes of each kind, and the bytes that its ledger says."""

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes = budget_bytes
        self.at_s: list[float] = []
        self.used_bytes: list[int] = []
        self.kinds: dict[str, list[int]] = {kind: [] for kind in KINDS}

    def add(self, at_s: float, kinds: dict[str, int], used_bytes: int) -> None:
        """One sample."""
        self.at_s.append(at_s)
        self.used_bytes.append(used_bytes)
        for kind, column in self.kinds.items():
            column.append(kinds.get(kind, 0))

    def hold_until(self, at_s: float) -> None:
        """Nothing changes any more: the last sample once again, at the end."""
        last = {kind: column[-1] for kind, column in self.kinds.items()}
        self.add(at_s, last, self.used_bytes[-1])

    @property
    def peak_bytes(self) -> int:
        """The most, fixed memory left out, as plans count."""
        return max(
            used - fixed for used, fixed in zip(self.used_bytes, self.kinds[FIXED], strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """The schema's object. Of very many samples the fullest of each stretch is kept."""
        rows = thinned(self.used_bytes, MOST_SAMPLES)
        return {
            "budget_bytes": self.budget_bytes,
            "samples": len(self.at_s),
            "t_s": [round(self.at_s[i], 6) for i in rows],
            "kinds": {kind: [column[i] for i in rows] for kind, column in self.kinds.items()},
            "used_bytes": [self.used_bytes[i] for i in rows],
        }


def thinned(values: list[int], most: int) -> list[int]:
    """Indices of at most so many: the first, the last, and the largest of each stretch between."""
    count = len(values)
    if count <= most:
        return list(range(count))
    stretch = -(-(count - 2) // (most - 2))
    inner = [
        max(range(i, min(i + stretch, count - 1)), key=values.__getitem__)
        for i in range(1, count - 1, stretch)
    ]
    return [0, *inner, count - 1]


def tier_columns(
    tape: Tape, budget_bytes: int, kind_of: Callable[[int], str], size_of: Callable[[int], int],
    for_good: dict[str, int],
) -> Columns:  # fmt: skip
    """A tier with frames. ``for_good``: bytes by kind of chunks that never leave, which the ledger
    has among the fixed.
    """
    before, columns = tape.before, Columns(budget_bytes)
    held = dict.fromkeys(KINDS, 0) | for_good
    held[FIXED] = before.fixed_bytes - sum(for_good.values())
    for chunk in before.chunks:
        held[kind_of(chunk)] += size_of(chunk)
    for other, size_bytes in before.other_bytes.items():
        held[other.value] += size_bytes

    def add(at_s: float, idle_bytes: int, used_bytes: int) -> None:
        staging_bytes = held[Other.STAGING.value] + idle_bytes
        columns.add(at_s, held | {Other.STAGING.value: staging_bytes}, used_bytes)

    add(0.0, before.idle_bytes, before.used_bytes)
    for sample in tape.samples():
        kind = _kind(sample, kind_of)
        if kind is not None:
            held[kind] += sample.change_bytes
        add(sample.at_s - tape.began_s, sample.idle_bytes, sample.used_bytes)
    columns.hold_until(tape.ended_s - tape.began_s)
    return columns


def _kind(sample: Sample, kind_of: Callable[[int], str]) -> str | None:
    """What changed; None: an idle frame went."""
    if isinstance(sample.what, Other):
        return sample.what.value
    return kind_of(sample.what) if sample.what >= 0 else None


def host_columns(tape: Tape, parts: Parts, tables: Tables) -> Columns:
    """The host tier."""
    for_good: dict[str, int] = {}
    for row in tables.chunks:
        if not row.on_disk:
            for_good[row.kind] = for_good.get(row.kind, 0) + row.size_bytes
    chunks = tables.chunks
    budget_bytes = parts.engine.ledger.budget_bytes
    return tier_columns(
        tape, budget_bytes, lambda c: chunks[c].kind, lambda c: chunks[c].size_bytes, for_good
    )


def device_columns(tape: Tape, parts: Parts) -> Columns:
    """The device tier: frames hold copies of weights and nothing else."""
    assert parts.device is not None
    engine = parts.device.engine
    chunks = engine.space.chunks
    return tier_columns(
        tape, engine.ledger.budget_bytes, lambda _: WEIGHTS, lambda c: chunks[c].size_bytes, {}
    )


def disk_columns(tape: Tape, parts: Parts, tables: Tables, budget_bytes: int | None) -> Columns:
    """The spill files, as they were when the step began."""
    columns = Columns(budget_bytes)
    kinds = dict.fromkeys(KINDS, 0)
    for row in tables.chunks:
        kinds[row.kind] += row.size_bytes if row.on_disk else 0
    disk = parts.engine.space.disk
    used_bytes = disk.used_bytes if disk is not None else 0
    swapped_bytes, kv_bytes = 0, tape.before.kv_disk_bytes
    if parts.hooks is not None:
        swapped_bytes = parts.hooks.activations.stats()["disk_bytes"]
    kinds[Other.ACTIVATIONS.value], kinds[Other.KV.value] = swapped_bytes, kv_bytes
    columns.add(0.0, kinds, used_bytes + swapped_bytes + kv_bytes)
    columns.hold_until(tape.ended_s - tape.began_s)
    return columns
