"""What a step could take at least, from what was recorded of it and the rates of its own copies.

Without a device that is the plan's own forecast. With one, both levels' traces say it together: to
the host's plan, waiting for a copy is computing.
"""

from __future__ import annotations

from offload.parts import Parts
from offload.prefetch.bounds import Framed, Limit, framed_bound
from offload.prefetch.variants import Saving
from offload.steps import Kind
from offload.track import Track


def limit_of(parts: Parts, kind: Kind) -> Limit | None:
    """Of steps of this kind (of inference: in the form that was called last); None: not known."""
    above = parts.device.steps.tracks[kind] if parts.device is not None else None
    return _limit(parts, kind, parts.steps.tracks[kind], above)


def limit_of_form(parts: Parts, form: str) -> Limit | None:
    """Of one form of inference."""
    above = parts.device.steps.forms.get(form) if parts.device is not None else None
    return _limit(parts, Kind.INFER, parts.steps.forms[form], above)


def more_device_memory(parts: Parts, kind: Kind) -> Saving | None:
    """What device memory would save, at most, in which every weight lived; None: nothing.

    Nothing would cross the bus then and the host would update nothing: what is left is computing.
    """
    device, limit = parts.device, limit_of(parts, kind)
    if device is None or device.residents is None or device.residents.kind is not kind:
        return None
    trace = device.steps.tracks[kind].trace
    if limit is None or trace is None:
        return None
    lacking_bytes = device.residents.lacking_bytes(trace)
    compute_s = sum(m.compute_s for m in trace.moments)
    saved_s = limit.bound_s - compute_s
    if lacking_bytes is None or lacking_bytes <= 0 or saved_s <= 0:
        return None
    return Saving(lacking_bytes, compute_s, saved_s)


def _limit(parts: Parts, kind: Kind, track: Track, above: Track | None) -> Limit | None:
    # Of a form that is new, or is to be planned anew: what its last step followed.
    follower = track.follower or (track.tape.follower if track.tape is not None else None)
    if follower is None:
        return None
    forecast = follower.plan.forecast
    limit = forecast.limit
    if parts.device is not None:
        if above is None or above.trace is None:
            return None
        limit = framed_bound(forecast.drive, follower.trace, _framed(parts, kind, above))
    if track.fits and track.step_s is not None:
        # Nothing moves and the hooks are off: steps themselves now tell what computing takes.
        limit = limit._replace(
            bound_s=min(limit.bound_s, track.step_s),
            wire_bound_s=min(limit.wire_bound_s, track.step_s),
        )
    return limit


def _framed(parts: Parts, kind: Kind, above: Track) -> Framed:
    device = parts.device
    assert device is not None
    assert above.trace is not None
    down_s = 0.0
    if device.outgoing is not None and kind is Kind.TRAIN and above.steps:
        down_s = device.outgoing.lane.meter.busy_s / above.steps
    forecast = above.forecast
    return Framed(
        above.trace, device.engine.frames.copied_bytes(), above.bytes_per_s("read"),
        read_bytes=forecast.read_bytes if forecast is not None else 0, down_s=down_s,
        kept=device.trust_versions, one_processor=device.place.type == "cpu",
    )  # fmt: skip
