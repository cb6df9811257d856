"""Rewrite the tables of docs/cli.md and the list of flags (tests/cli_flags.txt) from the app.

Run it after flags have changed on purpose; a test fails as long as app, docs and list differ.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer.main

from offload.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCS, LIST = ROOT / "docs" / "cli.md", ROOT / "tests" / "cli_flags.txt"
_BLOCK = re.compile(r"(<!-- flags of (\w+) -->\n).*?(<!-- end of flags -->)", re.DOTALL)


def commands() -> dict[str, Any]:
    """The app itself, as ``offload``, and each of its commands."""
    root: Any = typer.main.get_command(app)
    return {"offload": root, **root.commands}


def names(param: Any) -> str:
    """``--json``, ``--verbose, -v`` or ``--bf16/--no-bf16``; an argument in capitals."""
    if param.param_type_name == "argument":
        return str(param.name).upper()
    spelt = ", ".join(sorted(param.opts, key=len, reverse=True))
    return "/".join([spelt, *param.secondary_opts])


def flag_list() -> str:
    """All flags, one a line with its command before it."""
    rows = [f"{name} {names(p)}" for name, c in commands().items() for p in c.params]
    return "\n".join(sorted(rows)) + "\n"


def table(command: Any) -> str:
    """The flags of one command with defaults and meanings, as Markdown."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    rows += [f"| `{names(p)}` | {_default(p)} | {p.help} |" for p in command.params]
    return "\n".join(rows) + "\n"


def with_tables(text: str) -> str:
    """The docs with their tables made anew. Raises KeyError for a command that is not there."""
    found = commands()
    return _BLOCK.sub(lambda m: m[1] + table(found[m[2]]) + m[3], text)


def _default(param: Any) -> str:
    shown = getattr(param, "show_default", None)
    if isinstance(shown, str):
        return shown
    if isinstance(param.default, bool):
        return "no" if not param.default else "yes"
    return "" if param.default is None else str(param.default)


if __name__ == "__main__":
    DOCS.write_text(with_tables(DOCS.read_text()))
    LIST.write_text(flag_list())
