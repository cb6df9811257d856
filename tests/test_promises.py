"""P3: what the user can touch is valid, whenever user code runs.

Each test is a piece of user code (a `Life`) that runs on a plain and on a managed model, planned,
on demand and with transfers that complete out of order; all that it saw must be the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.small import backward

if TYPE_CHECKING:
    from tests.conftest import Life, Twins


def test_ordinary_steps(twins: Twins) -> None:
    twins(lambda life: life.steps(8))


# -- reading ----------------------------------------------------------------------------------


def test_all_is_readable_at_any_time(twins: Twins) -> None:
    def look(life: Life) -> None:
        life.note(life.params, [p.grad for p in life.params])
        life.note([life.optimizer.state[p] for p in life.params])

    def live(life: Life) -> None:
        for seed in range(4):
            loss = life.loss(seed)
            look(life)
            backward(loss)
            look(life)
            life.evict()
            look(life)
            life.optimizer.step()
            look(life)
            life.optimizer.zero_grad()
            look(life)

    twins(live)


def test_all_is_readable_and_writable_in_hooks(twins: Twins) -> None:
    def live(life: Life) -> None:
        params = life.params

        def touch(*_: object) -> None:
            with torch.no_grad():
                life.note(torch.stack([p.sum() for p in params]))
                life.note([p.grad for p in params[::3]])
                params[0].data.mul_(0.999)
                params[-2].numpy()[...] *= 0.999
                for p in params[1::4]:
                    if p.grad is not None:
                        p.grad.mul_(0.99)

        for p in params[::2]:
            p.register_post_accumulate_grad_hook(touch)
        life.model.get_submodule("6").register_forward_hook(touch)
        life.model.get_submodule("8").register_full_backward_hook(touch)
        life.optimizer.register_step_post_hook(touch)
        life.steps(4)

    twins(live)


# -- writing ----------------------------------------------------------------------------------


def test_every_kind_of_write_is_honoured(twins: Twins) -> None:
    def live(life: Life) -> None:
        params = life.params
        arrays: list[Any] = [p.detach().numpy() for p in params]
        views = [p.data.view(-1)[::2] for p in params]

        def write(seed: int) -> None:
            for p, array, view in zip(params, arrays, views, strict=True):
                p.data.mul_(1 + seed / 1000)
                array += 1e-4
                view.sub_(1e-4)
                with torch.no_grad():
                    p.add_(1e-5)

        for seed in range(5):
            write(seed)
            life.evict()
            write(seed)
            loss = life.loss(seed)
            for array in arrays[-2:]:
                array *= 0.99  # unseen by autograd, as in plain PyTorch
            backward(loss)
            for p in params:
                assert p.grad is not None
                p.grad.data.mul_(1.01)
                p.grad.numpy()[...] += 1e-5
            life.optimizer.step()
            write(seed)
            for p in params:
                for value in life.optimizer.state[p].values():
                    value.data.mul_(0.9) if value.dim() else None
            life.optimizer.zero_grad()
            life.note(loss, [torch.from_numpy(a) for a in arrays], views)

    twins(live)


def test_write_right_after_a_step_while_weights_are_read_ahead(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(8):
            life.steps(1, seed)
            for p in life.params:
                p.data.mul_(0.99)

    twins(live)


def test_gradients_that_the_user_keeps(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        backward(life.loss(5))
        kept = [p.grad for p in life.params]
        arrays: list[Any] = [g.numpy() for g in kept if g is not None]
        life.optimizer.step()
        life.optimizer.zero_grad()
        life.evict()
        life.note(kept, [torch.from_numpy(a) for a in arrays])
        life.steps(2)
        life.note(kept, [torch.from_numpy(a) for a in arrays])
        del kept, arrays
        life.steps(2)

    twins(live, host_bytes=2**20)


def test_gradient_put_aside_and_added_back(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        backward(life.loss(5))
        aside = [p.grad for p in life.params]
        for p in life.params:
            p.grad = None
        life.evict()
        backward(life.loss(6))
        for p, g in zip(life.params, aside, strict=True):
            assert p.grad is not None
            assert g is not None
            p.grad.add_(g)
        life.optimizer.step()
        for p, g in zip(life.params, aside, strict=True):
            p.grad = g
        life.evict()
        life.optimizer.step()

    twins(live, host_bytes=2**20)


def test_gradients_in_a_buffer_of_the_users(twins: Twins) -> None:
    def live(life: Life) -> None:
        flat = torch.zeros(sum(p.numel() for p in life.params))
        parts = torch.split(flat, [p.numel() for p in life.params])
        for p, part in zip(life.params, parts, strict=True):
            p.grad = part.view_as(p)
        for seed in range(3):
            flat.zero_()
            backward(life.loss(seed))
            flat.mul_(0.5)
            life.note(flat)
            life.optimizer.step()

    twins(live, host_bytes=2**20)


def test_zero_grad_in_place(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(5):
            backward(life.loss(seed))
            life.optimizer.step()
            life.optimizer.zero_grad(set_to_none=seed == 3)
            life.evict()
            life.note([p.grad for p in life.params])

    twins(live)


def test_replaced_data(twins: Twins) -> None:
    def live(life: Life) -> None:
        life.steps(3)
        held = [torch.full_like(p, 0.01) for p in life.params]
        for p, tensor in zip(life.params, held, strict=True):
            p.data = tensor
        life.steps(2)
        for tensor in held:
            tensor.mul_(2.0)  # what the user assigned is still what the model has
        life.steps(2)

    twins(live, host_bytes=2**20)


def test_swapping_weights_for_an_evaluation(twins: Twins) -> None:
    def live(life: Life) -> None:
        average = [p.detach().clone() for p in life.params]
        for seed in range(4):
            life.steps(1, seed)
            own = [p.data for p in life.params]
            for p, other in zip(life.params, average, strict=True):
                other.lerp_(p.data, 0.1)
                p.data = other
            with torch.no_grad():
                life.note(life.loss(50))
            for p, mine in zip(life.params, own, strict=True):
                p.data = mine

    twins(live, host_bytes=2**20)


# -- autograd ---------------------------------------------------------------------------------


def test_backward_twice_and_stale_graph(twins: Twins) -> None:
    def live(life: Life) -> None:
        loss = life.loss(0)
        backward(loss, retain_graph=True)
        backward(loss, retain_graph=True)
        life.note([p.grad for p in life.params])
        life.optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(loss)
        life.optimizer.zero_grad()
        del loss
        life.steps(2)

    twins(live, host_bytes=2**20)


def test_activation_changed_in_place_raises(twins: Twins) -> None:
    def live(life: Life) -> None:
        layers = [life.model.get_submodule(name) for name in ("8", "9")]
        hooks = [m.register_forward_hook(lambda m, a, out: out.mul_(2.0)) for m in layers]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            backward(life.loss(0))
        for hook in hooks:
            hook.remove()
        life.optimizer.zero_grad()
        life.steps(2)

    twins(live, host_bytes=2**20)


def test_gradients_of_gradients(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(3):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
            x.requires_grad_(True)
            loss = life.model(x).square().sum()
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            backward(loss + slope.square().sum())
            life.note(loss, [p.grad for p in life.params])
            life.optimizer.step()
            life.optimizer.zero_grad()

    def build() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())

    twins(live, build=build, host_bytes=220 * 1024)


def test_autograd_grad_leaves_no_debt(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(6):
            life.note(torch.autograd.grad(life.loss(seed), life.params))
        life.steps(2)
        if life.run is not None:
            assert life.run.parts.engine.ledger.other_bytes == 0

    twins(live)


def test_graph_that_is_dropped_is_freed(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(5):
            life.note(life.loss(seed))  # in training mode, and never a backward pass
        if life.run is not None:
            assert life.run.parts.engine.ledger.other_bytes == 0
        life.steps(2)

    twins(live)


def test_functional_call_with_other_weights(twins: Twins) -> None:
    def live(life: Life) -> None:
        for seed in range(3):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
            scaled = {k: v * 1.1 for k, v in life.model.named_parameters()}
            loss = torch.func.functional_call(life.model, scaled, (x,)).square().sum()
            backward(loss)
            life.note(loss)
            life.optimizer.step()
            life.optimizer.zero_grad()

    twins(live, host_bytes=2**20)


@pytest.mark.parametrize(("dtype", "host_kib"), [(torch.float64, 780), (torch.bfloat16, 640)])
def test_other_dtype_in_mid_run(twins: Twins, dtype: torch.dtype, host_kib: int) -> None:
    def live(life: Life) -> None:
        life.steps(2)
        life.model.to(dtype)
        for seed in range(3):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            backward(life.model(x).square().mean())
            life.note([p.grad for p in life.params])
            life.optimizer.step()
            life.optimizer.zero_grad()

    twins(
        live,
        build_optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        host_bytes=host_kib * 1024,
    )
