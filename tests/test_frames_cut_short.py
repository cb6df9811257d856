"""Backward passes in frames that were cut short: what they leave behind harms no later pass.

On CUDA one thread goes on sending gradients while another one raises; here they are sent by hand.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.device_hooks import await_autograd
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


def two_steps(folder: Path) -> tuple[nn.Sequential, torch.optim.Optimizer, Watched]:
    """A run behind its second step."""
    model = mlp()
    optimizer = adamw(model)
    watched = Watched(model, folder, optimizer, host="1MiB")
    train(model, optimizer, range(2))
    return model, optimizer, watched


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
    _, _, watched = two_steps(tmp_path)
    send_and_fail(watched, monkeypatch)
    watched.close()


def test_a_copy_that_fails_is_an_error_of_its_own_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, watched = two_steps(tmp_path)
    loss = loss_of(model, 2)
    last: Any = model[7].weight
    handle = last.register_hook(lambda _: send_and_fail(watched, monkeypatch))
    with pytest.raises(OSError, match="the bus is gone"):
        loss.backward()
    handle.remove()
    optimizer.zero_grad()
    train(model, optimizer, range(2, 3))
    watched.close()


def test_a_node_that_ends_after_the_error_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread plays autograd's for the device, which is amid a node when another one raises."""
    plain, model = mlp(), mlp()
    reference, optimizer = adamw(plain), adamw(model)
    watched = Watched(model, tmp_path, optimizer, host="1MiB")
    losses = train(model, optimizer, range(2))
    hooks: Any = watched.runtime.parts.hooks
    first: Any = model[0]
    late = threading.Event()

    def straggle() -> None:
        late.wait(timeout=30)
        hooks._gradient_out(first.weight, torch.ones_like(first.weight))

    def fail(_: object) -> None:
        raise ValueError("on purpose")

    thread = threading.Thread(target=straggle, daemon=True)
    thread.start()
    last: Any = model[7].weight
    handle = last.register_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        loss_of(model, 2).backward()
    handle.remove()
    optimizer.zero_grad()

    def await_it(place: torch.device) -> None:
        assert place == watched.device.place
        late.set()
        thread.join(timeout=20)
        assert not thread.is_alive(), "it cannot go on: the lock is held"

    monkeypatch.setattr("offload.device_hooks.await_autograd", await_it)
    loss = loss_of(model, 2)
    assert late.is_set()
    outgoing = watched.device.outgoing
    assert outgoing is not None
    assert outgoing.sent_bytes == 0
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    monkeypatch.setattr("offload.device_hooks.await_autograd", pytest.fail)  # nothing was cut short
    losses += [loss.item(), *train(model, optimizer, range(3, 5))]
    assert losses == train(plain, reference, range(5))
    assert same(weights(model), weights(plain))
    assert watched.device.engine.ledger.other_bytes == 0
    watched.close()


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_pass_goes_behind_what_autograds_thread_is_at(place: str, mode: Any) -> None:
    seen: list[int] = []

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            begun.set()
            time.sleep(0.2)  # gives the other thread its turn
            seen.append(len(seen))
            return grads[0]

    begun = threading.Event()
    x = torch.zeros((), device=place, requires_grad=True)
    thread = threading.Thread(target=Slow.apply(x).backward)
    thread.start()
    assert begun.wait(timeout=20)
    with mode():
        await_autograd(torch.device(place))
    if place == "cuda":  # on the CPU each caller is a thread of its own
        assert seen == [0]
    thread.join()
