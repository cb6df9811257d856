"""The documentation names what the code has, with its defaults, and nothing else."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import offload
from offload.config import Tuning
from offload.errors import OffloadError
from offload.places import BlockPlan
from offload.run import Runtime
from offload.runconfig import RunConfig
from offload.sampling import Sampling

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REQUIRED = "required"
Settings = dict[str, Any]
SHARED = ("device", "device_memory", "compute_dtype", "host_memory", "disk", "disk_memory",
          "weight_dtype", "tuning")  # fmt: skip


def documented(heading: str) -> Settings:
    """Names and defaults of the table below a heading of docs/config.md."""
    text = (DOCS / "config.md").read_text()
    assert f"\n### {heading}\n" in text
    part = text.split(f"\n### {heading}\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| .+ \|$", part, re.MULTILINE)
    assert len(rows) == len(dict(rows)), "named twice"
    return {name: cell if cell == REQUIRED else ast.literal_eval(cell.strip("`"))
            for name, cell in rows}  # fmt: skip


def keywords(function: Callable[..., Any]) -> Settings:
    """The keyword-only parameters."""
    every = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in every if p.kind is inspect.Parameter.KEYWORD_ONLY}


def settings(kind: type, prefix: str = "") -> Settings:
    """The fields of a dataclass, and of those in it, as key paths."""
    found: Settings = {}
    assert is_dataclass(kind)
    for f in fields(kind):
        hint = get_type_hints(kind)[f.name]
        if isinstance(hint, type) and is_dataclass(hint):
            found |= settings(hint, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = REQUIRED if f.default is MISSING else f.default
    return found


def without(these: Settings, names: tuple[str, ...]) -> Settings:
    return {name: default for name, default in these.items() if name not in names}


def test_keywords_of_the_entry_points() -> None:
    shared = documented("`wrap`, `init` and `from_pretrained`")
    assert tuple(sorted(shared)) == tuple(sorted(SHARED))
    assert shared == keywords(offload.init)
    assert shared | documented("`wrap` alone") == keywords(offload.wrap)
    assert shared | documented("`from_pretrained` alone") == keywords(offload.from_pretrained)
    assert without(keywords(offload.wrap), SHARED) == documented("`wrap` alone")


@pytest.mark.parametrize("kind", [Sampling, BlockPlan, RunConfig, Tuning])
def test_fields_of_settings(kind: type) -> None:
    assert documented(f"`{kind.__name__}`") == settings(kind)


@pytest.mark.parametrize("method", [Runtime.generate, Runtime.kv_cache])
def test_keywords_of_the_runtime(method: Callable[..., Any]) -> None:
    assert documented(f"`{method.__name__}`") == keywords(method)


def error_classes() -> set[str]:
    """Every error of our own that is defined anywhere in the package."""
    kinds = set()
    for folder in ("offload", "tiers", "prefetch", "optim"):
        for path in sorted((ROOT / folder).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef) and any(
                    isinstance(base, ast.Name) and base.id.endswith("Error") for base in node.bases
                ):
                    kinds.add(node.name)
    return kinds


def test_every_error_that_reaches_users_has_a_section() -> None:
    named = set(re.findall(r"^## `(\w+)`", (DOCS / "errors.md").read_text(), re.MULTILINE))
    module = importlib.import_module("offload.errors")
    public = {
        name for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, OffloadError)
    }  # fmt: skip
    assert public <= named
    assert named <= error_classes()


LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
BEING_WRITTEN = {"cli.md", "plan.md", "report-schema.md"}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda p: str(p.name)
)
def test_links_lead_somewhere(page: Path) -> None:
    missing = {x for x in LINK.findall(page.read_text()) if not (page.parent / x).exists()}
    assert missing <= BEING_WRITTEN
