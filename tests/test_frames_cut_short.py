"""Backward passes in frames that were cut short: what they leave behind harms no later pass.

On CUDA one thread goes on sending gradients while another one raises; here they are sent by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload.tiers.copy import PlainCopier
from tests.framed import Watched, adamw
from tests.resident import loss_of, mlp, same, train, weights


def send_and_fail(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some gradients have left when the pass ends with an error, and their copies fail."""
    device: Any = watched.device

    def broken(*_: object) -> None:
        raise OSError("the bus is gone")

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(PlainCopier, "download", broken)
        for param in list(watched.model.parameters())[:3]:
            grad = torch.ones_like(param)
            device.engine.take_other(grad.nbytes, "a gradient")
            device.outgoing.send(param, grad)
        for sent in device.outgoing._sent.values():
            with pytest.raises(OSError, match="the bus is gone"):
                device.outgoing.lane.wait(sent.ticket)


def test_copies_that_failed_are_no_error_of_the_next_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, model = mlp(), mlp()
    reference, optimizer = adamw(plain), adamw(model)
    watched = Watched(model, tmp_path, optimizer, host="1MiB")
    losses = train(model, optimizer, range(2))
    send_and_fail(watched, monkeypatch)
    losses += train(model, optimizer, range(2, 5))
    outgoing = watched.device.outgoing
    assert outgoing is not None
    assert outgoing.sent_bytes == watched.device.engine.ledger.other_bytes == 0
    assert losses == train(plain, reference, range(5))
    assert same(weights(model), weights(plain))
    watched.close()


def test_copies_that_failed_do_not_keep_a_run_from_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = adamw(model)
    watched = Watched(model, tmp_path, optimizer, host="1MiB")
    train(model, optimizer, range(2))
    send_and_fail(watched, monkeypatch)
    watched.close()


def test_a_copy_that_fails_is_an_error_of_its_own_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mlp()
    optimizer = adamw(model)
    watched = Watched(model, tmp_path, optimizer, host="1MiB")
    train(model, optimizer, range(2))
    loss = loss_of(model, 2)
    last: Any = model[7].weight
    handle = last.register_hook(lambda _: send_and_fail(watched, monkeypatch))
    with pytest.raises(OSError, match="the bus is gone"):
        loss.backward()
    handle.remove()
    optimizer.zero_grad()
    train(model, optimizer, range(2, 3))
    watched.close()
