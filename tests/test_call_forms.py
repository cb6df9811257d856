"""Forms of calls that have plans of their own, and trials of steps without reading ahead."""

from __future__ import annotations

import itertools

import torch

from offload.calls import Call, call_of, entries
from offload.trial import STEPS, TRIES, Trial
from tests.test_generate import _build


def test_forms_of_calls() -> None:
    from transformers import DynamicCache

    ids = torch.ones(2, 5, dtype=torch.int64)
    cache = DynamicCache()
    first = call_of("", (), {"input_ids": ids, "past_key_values": cache})
    assert first == Call("", False, 10, 10)
    cache.update(torch.zeros(2, 1, 5, 4), torch.zeros(2, 1, 5, 4), 0)
    mask = torch.ones(2, 6)
    then = call_of(
        "", (), {"attention_mask": mask, "input_ids": ids[:, :1], "past_key_values": cache}
    )
    assert then == Call("", True, 2, 12 + 2 + 10)
    assert (first.form, then.form) == ("prefill 16", "decode 2")
    assert list(entries(_build("t5"))) == ["encoder", "decoder"]
    assert list(entries(_build("llama"))) == ["model"]


def test_reading_ahead_that_loses_is_given_up() -> None:
    """Also where the machine becomes twice as fast, or as slow, when the trial begins."""
    cases = itertools.product((0.9, 1.1), (0.5, 1.0, 2.0))
    for without, pace in cases:
        trial = Trial()
        for _ in range(STEPS):
            assert trial.ahead
            trial.note(1.3, forecast_s=1.0)
        for _ in range(TRIES):
            assert not trial.ahead
            trial.note(1.3 * without * pace, forecast_s=1.0)
            assert trial.ahead
            trial.note(1.3 * pace, forecast_s=1.0)
        assert (trial.over, trial.ahead) == (True, without > 1)
    good = Trial()
    for _ in range(3 * STEPS):
        good.note(1.1, forecast_s=1.0)
    assert (good.over, good.ahead) == (False, True)
