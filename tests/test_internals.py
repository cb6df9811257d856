"""Torch's private names: used in one file, and what happens when a later torch lacks them."""

from __future__ import annotations

import ast
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

import offload
from offload.blueprint import FineTune, draft
from offload.calls import is_known
from offload.errors import BudgetError, OffloadError
from offload.internals import TorchDispatchMode, backward_runs, in_transform, when_backward_ends
from offload.tinymodel import tiny_config
from tests.framed import Watched
from tests.test_imports import ROOT, modules

GATHERED = ROOT / "offload" / "internals.py"
FOLDERS = ("offload", "tiers", "prefetch", "optim", "bench", "scripts", "examples")


def private_names(path: Path) -> list[str]:
    """Private names of torch that a file imports, or reaches through what it has imported."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found: list[str] = []
    ours: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        full = [name for name in full if name.split(".")[0] == "torch"]
        if full:
            ours.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        found += [name for name in full if hidden(name)]
    chains = [ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)]
    return found + [
        c for c in chains
        if re.fullmatch(r"[\w.]+", c) and c.split(".")[0] in ours
        if hidden(c) and not c.startswith("torch.ops.")
    ]  # fmt: skip


def hidden(name: str) -> bool:
    """Whether a part of a dotted name is private."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


@pytest.mark.parametrize("folder", FOLDERS)
def test_torchs_private_names_stand_in_one_file(folder: str) -> None:
    used = {p.name: private_names(p) for p in modules(folder) if p != GATHERED}
    assert not {name: names for name, names in used.items() if names}


def test_private_names_are_found(tmp_path: Path) -> None:
    assert len(private_names(GATHERED)) > 5
    file = tmp_path / "bad.py"
    file.write_text(
        "import torch\nfrom torch import nn\nfrom torch.utils._pytree import tree_map\n"
        "torch._C.x()\nnn.modules.module._y\ntorch.__version__\nself._z\ntorch.ops.aten._a\n"
    )
    assert set(private_names(file)) == {
        "torch.utils._pytree.tree_map", "torch._C", "torch._C.x", "nn.modules.module._y",
    }  # fmt: skip


class Functions(TorchFunctionMode):
    """A mode of the user's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """A mode of the user's, one level below."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_code_is_not_known_beside_the_users_modes_and_hooks() -> None:
    model = nn.Linear(2, 2)
    assert is_known(model)
    for mode in (Functions(), Operations()):
        with mode:
            assert not is_known(model)
        assert is_known(model)
    handle = register_module_forward_hook(lambda *_: None)
    assert not is_known(model)
    handle.remove()
    assert is_known(model)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(nn.modules.module, "_has_any_global_hook"), (torch._C, "_len_torch_dispatch_stack")],
)
def test_where_torch_cannot_say_code_is_not_known(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(owner, name)
    assert not is_known(nn.Linear(2, 2))


def test_where_torch_cannot_say_it_refuses_transforms_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    monkeypatch.delattr(torch._C._functorch, "peek_interpreter_stack")
    offload.wrap(model, host_memory="64MiB", disk=tmp_path)
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: model(x).sum())(torch.ones(2, 8))
    model(torch.ones(2, 8)).sum().backward()
    offload.runtime(model).close()


def test_transforms_are_told() -> None:
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(in_transform())
        return x.sum()

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.grad(look)(torch.ones(2))
    assert seen == [False, True, True]


def test_a_backward_pass_is_told_and_its_end() -> None:
    told: list[object] = []
    x = torch.ones(2, requires_grad=True)

    def hook(grad: Tensor) -> None:
        told.append((backward_runs(), threading.get_ident()))
        when_backward_ends(lambda: told.append("over"))

    x.register_hook(hook)
    x.sum().backward()
    assert told == [(True, threading.get_ident()), "over"]
    assert not backward_runs()


@pytest.mark.parametrize(
    "name", ["_current_graph_task_id", "queue_callback", "_compiled_call_impl"]
)
def test_frames_are_refused_where_torch_cannot_serve_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "queue_callback":
        runs = SimpleNamespace(run_backward=Variable._execution_engine.run_backward)
        monkeypatch.setattr(Variable, "_execution_engine", runs)
    else:
        owner = torch._C if hasattr(torch._C, name) else nn.Module
        monkeypatch.delattr(owner, name)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    with pytest.raises(OffloadError, match=rf"torch .* has no torch\S*\.{name}, without which"):
        Watched(model, tmp_path).model(torch.ones(2, 8)).sum().backward()


def test_without_fake_tensors_there_is_no_plan_and_no_foresight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch._subclasses.fake_tensor", None)
    with pytest.raises(OffloadError, match=r"no torch\._subclasses\.\S*FakeTensorMode, without"):
        draft(tiny_config(), FineTune())
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    offload.wrap(model, host_memory="8MiB", disk=tmp_path)
    with pytest.raises(BudgetError, match="so far"):
        model(torch.ones(4096, 512))
    offload.runtime(model).close()
