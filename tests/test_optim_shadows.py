"""A shadow that changed nothing is used again; one that changed anything never is."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from offload.errors import CoupledOptimizerError
from offload.optim.groups import GroupLedger

Change = Callable[[Optimizer], object]


def ledger(**values: Any) -> GroupLedger:
    first = {"params": [torch.zeros(3)], "lr": 0.1, "betas": (0.9, 0.99), **values}
    groups = [first, {"params": [torch.zeros(2)], "lr": 0.2, "step": 4}]
    return GroupLedger(torch.optim.SGD(groups, lr=0.1))


def shown(optimizer: Optimizer) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    hidden = ("state", "param_groups")
    return groups, {k: v for k, v in optimizer.__dict__.items() if k not in hidden}


def opened(book: GroupLedger, tensor: Tensor) -> Optimizer:
    return book.open({0: [tensor]}, {tensor: {"moment": tensor}})


def test_a_shadow_that_changed_nothing_is_used_again_and_keeps_no_tensors() -> None:
    book = ledger()
    tensor = torch.ones(5)
    twin = opened(book, tensor)
    assert twin.param_groups[0]["params"][0] is tensor
    book.close(twin, [0])
    ref = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert ref() is None
    other = torch.ones(7)
    again = book.open({1: [other]}, {})
    assert again is twin
    assert [len(g["params"]) for g in again.param_groups] == [0, 1]
    assert again.param_groups[1]["params"][0] is other
    assert not again.state


CHANGES: dict[str, Change] = {
    "value": lambda o: o.param_groups[0].update(lr=0.3),
    "value of a group that had no parameters": lambda o: o.param_groups[1].update(step=5),
    "added": lambda o: o.param_groups[0].update(k=1),
    "removed": lambda o: o.param_groups[0].pop("betas"),
    "renamed": lambda o: o.param_groups[0].update(k=o.param_groups[0].pop("betas")),
    "attribute": lambda o: o.__dict__.update(defaults={}),
    "added attribute": lambda o: o.__dict__.update(seen=1),
    "list": lambda o: o.param_groups[0]["list"].append(2),
    "tensor": lambda o: o.param_groups[0]["rate"].add_(1),
}


UNSEEN = ("value of a group that had no parameters", "attribute", "added attribute")


@pytest.mark.parametrize("name", CHANGES)
def test_after_a_change_the_next_shadow_starts_from_the_start(name: str) -> None:
    more: dict[str, Any] = {"list": [1]} if name == "list" else {}
    more |= {"rate": torch.ones(())} if name == "tensor" else {}
    book = ledger(**more)
    attributes = shown(twin := opened(book, torch.ones(5)))[1]
    start = copy.deepcopy(shown(twin)[0])
    book.close(twin, [0])
    twin = opened(book, torch.ones(5))
    CHANGES[name](twin)
    if name in UNSEEN:  # by a comparison of what two shadows did
        book.close(twin, [0])
    else:
        with pytest.raises(CoupledOptimizerError):
            book.close(twin, [0])
    after = opened(book, torch.ones(5))
    assert after is not twin
    assert shown(after) == (start, attributes)
