"""Which chunks live on the device for good: those that spare a step most seconds for a byte.

What lives there needs no copy and is updated there; what it takes of the device is gone for the
frames of the rest. Of chunks that are worth the same, some of every stretch of the model are
taken: while those are computed with, the next of the others come over the bus. (A stretch that
lives there as a whole would leave the bus idle, and the rest waiting for it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from offload.prefetch.trace import Trace

# Weights that live on the device are updated in groups of so many elements: few calls, temporaries
# of 64 MiB each.
GROUP_ELEMENTS = 1 << 24
UPDATE_BYTES = 3 * 4 * GROUP_ELEMENTS  # temporaries of one such group
_GOLDEN = 0.6180339887498949  # its multiples are spread evenly over [0, 1), however many there are


@dataclass(frozen=True, slots=True)
class Rates:
    """``up_bytes_per_s``: of a copy to the device; ``update_s``: of one element on the host."""

    up_bytes_per_s: float
    update_s: float


@dataclass(frozen=True, slots=True)
class Offer:
    """A chunk that could live on the device.

    ``cost_bytes``: of its weights there, with gradients and optimizer state where it is trained.
    ``spared_s``: what each step then is spared of copies and of updating elsewhere.
    """

    chunk: int
    cost_bytes: int
    spared_s: float


def offer_of(
    trace: Trace, chunk: int, cost_bytes: int, copied_bytes: int, trained_elements: int,
    rates: Rates,
) -> Offer:  # fmt: skip
    """What a chunk would spare: a copy up for each pass that needs it and, where any of it is
    trained, its gradients' way down and its update on the host.

    ``copied_bytes``: without padding, or chunks alike would be worth more or less by their rates.
    """
    passes = len({m.phase for m in trace.moments if any(n.chunk == chunk for n in m.needs)})
    copies = passes + (1 if trained_elements else 0)
    spared_s = copies * copied_bytes / rates.up_bytes_per_s
    return Offer(chunk, cost_bytes, spared_s + trained_elements * rates.update_s)


def update_s(host: Trace | None, elements: int) -> float:
    """Seconds of an update on the host, for each of so many elements; 0: not known.

    ``host``: a step as the host saw it.
    """
    moments = host.moments if host is not None else ()
    return sum(m.compute_s for m in moments if m.phase.updates) / max(elements, 1)


def choose_residents(
    trace: Trace, offers: Sequence[Offer], capacity_bytes: int, *, aside_bytes: int = 0
) -> tuple[int, ...]:
    """Chunks that shall live on the device, in the order of what they are worth.

    ``trace``: a step in which none does. ``capacity_bytes``: for frames, other memory and
    residents. ``aside_bytes``: what an update of residents takes for a moment. All of them where
    all fit beside the trace's other memory; else what is left beside the hungriest moment and the
    two largest chunks, read ahead.
    """
    touched = {n.chunk for m in trace.moments for n in m.needs}
    useful = [offer for offer in offers if offer.chunk in touched]
    if not useful:
        return ()
    other_bytes = max(m.other_bytes for m in trace.moments)
    everything_bytes = sum(offer.cost_bytes for offer in useful)
    complete = touched <= {offer.chunk for offer in useful}
    if complete and everything_bytes + max(other_bytes, aside_bytes) <= capacity_bytes:
        return tuple(offer.chunk for offer in _by_worth(useful))
    spare_bytes = capacity_bytes - max(_hungriest_bytes(trace), aside_bytes)
    spare_bytes -= sum(sorted((trace.chunk_bytes[c] for c in touched), reverse=True)[:2])
    chosen = []
    for offer in _by_worth(useful):
        if offer.cost_bytes <= spare_bytes:
            spare_bytes -= offer.cost_bytes
            chosen.append(offer.chunk)
    return tuple(chosen)


def _hungriest_bytes(trace: Trace) -> int:
    """Of the moment that holds most: its chunks and what is not chunks."""
    return max(
        m.other_bytes + sum(trace.chunk_bytes[c] for c in {n.chunk for n in m.needs})
        for m in trace.moments
    )


def _by_worth(offers: Sequence[Offer]) -> list[Offer]:
    """The most seconds a byte first; of equal ones a few of each stretch."""

    def worth(indexed: tuple[int, Offer]) -> tuple[float, float]:
        i, offer = indexed
        per_byte = offer.spared_s / max(offer.cost_bytes, 1)
        return -float(f"{per_byte:.2e}"), i * _GOLDEN % 1.0

    return [offer for _, offer in sorted(enumerate(offers), key=worth)]
