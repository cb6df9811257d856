"""Who may import whom, and that a user's own files of the same names change nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# For each package: what of `offload` it may import besides itself.
ALLOWED = {
    "tiers": (),
    "prefetch": ("offload.tiers.spec",),
    "optim": ("offload.tiers", "offload.errors"),
}
HEAVY = {"torch", "numpy", "transformers"}
BARE = {"tiers", "prefetch", "optim"}


def modules(folder: str) -> list[Path]:
    """The Python files of a package."""
    return sorted((ROOT / folder).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the import name"
            assert node.module is not None
            names.add(node.module)
            if node.module == "offload":
                names.update(f"offload.{alias.name}" for alias in node.names)
    return names


def violations(folder: str, path: Path) -> list[str]:
    """Imports of other parts of `offload` that the package may not make."""
    allowed = (f"offload.{folder}", *ALLOWED[folder])
    return [
        name
        for name in sorted(imported(path))
        if name.split(".")[0] == "offload" and name != "offload"
        if not any(name == a or name.startswith(a + ".") for a in allowed)
    ]


@pytest.mark.parametrize(
    ("folder", "path"), [(f, p) for f in ALLOWED for p in modules(f)], ids=lambda x: str(x)[-30:]
)
def test_packages_import_only_what_lies_below(folder: str, path: Path) -> None:
    assert violations(folder, path) == []


def test_the_rule_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from offload.tiers import home\n    import offload.engine\n")
    assert violations("prefetch", file) == ["offload.engine", "offload.tiers"]
    file.write_text("from offload.tiers.spec import Machine\n")
    assert violations("prefetch", file) == []
    assert violations("tiers", file) == []


def test_every_package_has_files() -> None:
    for folder in (*ALLOWED, "offload"):
        assert len(modules(folder)) > 2, f"{folder}: nothing to check"


@pytest.mark.parametrize("path", modules("prefetch"), ids=lambda p: p.name)
def test_prefetch_is_pure(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"torch", "os", "io", "time", "threading", "pathlib", "random", "ctypes"}


def test_plain_data_needs_no_torch() -> None:
    assert not {n.split(".")[0] for n in imported(ROOT / "tiers" / "spec.py")} & HEAVY


@pytest.mark.parametrize("folder", [*ALLOWED, "offload", "tests", "bench", "scripts"])
def test_nobody_imports_the_bare_names(folder: str) -> None:
    for path in modules(folder):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & BARE, f"{path}: a bare name may be the user's own file"


SCRIPT = """
import sys
import offload
assert "torch" not in sys.modules, "import offload is to load no torch"
from offload.prefetch import planner
assert "torch" not in sys.modules, "the planner is to load no torch"
import optim, tiers, prefetch
assert optim.MINE and tiers.MINE and prefetch.MINE
import torch
from torch import nn
from offload.config import Tuning
from offload.tiers.spec import Machine
model = nn.Linear(64, 64)
optimizer = torch.optim.AdamW(model.parameters())
tuning = Tuning(chunk_bytes=16384, machine=Machine(1e9, 1e9, 1e9, 1e9, 1e9), keep_hooks=True)
offload.wrap(model, optimizer, host_memory=128 * 1024, disk=sys.argv[1], tuning=tuning)
for _ in range(3):
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
assert offload.runtime(model).stats()["steps"] == 3
print("trained beside", optim.__file__)
"""


def test_users_files_of_the_same_names_change_nothing(tmp_path: Path) -> None:
    for name in BARE:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "train.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", "train.py", str(tmp_path / "spill")],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"trained beside {tmp_path / 'optim.py'}" in done.stdout
