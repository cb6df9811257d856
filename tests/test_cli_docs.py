"""The flags are those of a committed list, and docs/cli.md has all of them and no other."""

from __future__ import annotations

import re
import runpy
from dataclasses import MISSING
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from offload import cli, finetune_cli, generate_cli, plan_cli
from offload.command import EXIT_CODES
from offload.generateconfig import GenerateConfig
from offload.planconfig import PlanConfig
from offload.runconfig import RunConfig
from offload.settings import default_of

ROOT = Path(__file__).resolve().parent.parent
MAKER = runpy.run_path(str(ROOT / "scripts" / "cli_docs.py"))
DOCS = (ROOT / "docs" / "cli.md").read_text()
REMEDY = "a flag came, went or changed: if that is meant, run python scripts/cli_docs.py"
COMMANDS: dict[str, Any] = MAKER["commands"]()


def test_the_flags_are_those_that_were_agreed() -> None:
    assert (ROOT / "tests" / "cli_flags.txt").read_text() == MAKER["flag_list"](), REMEDY


def test_the_docs_have_every_flag_with_its_default_and_meaning_and_no_other() -> None:
    assert re.findall(r"<!-- flags of (\w+) -->", DOCS) == list(COMMANDS), "a command has no table"
    assert MAKER["with_tables"](DOCS) == DOCS, REMEDY
    documented = set(re.findall(r"^\| `(-[^`]+)`", DOCS, re.MULTILINE))
    assert documented == {MAKER["names"](p) for c in COMMANDS.values() for p in c.params
                          if p.param_type_name == "option"}  # fmt: skip


def test_every_flag_has_a_meaning_of_its_own_in_one_sentence() -> None:
    for name, command in COMMANDS.items():
        for param in command.params:
            assert param.help, f"{name} {param.name}"
            assert "|" not in param.help, "it would break the table"


def test_the_docs_have_every_exit_status() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", DOCS, re.MULTILINE)
    assert {int(code): what for code, what in rows} == EXIT_CODES


@pytest.mark.parametrize("name", ["finetune", "generate", "plan", "probe", "report"])
def test_help_has_examples_and_exit_statuses_and_docs_the_examples(name: str) -> None:
    epilog = COMMANDS[name].epilog
    assert all(f"{code} {what}" in epilog for code, what in EXIT_CODES.items())
    examples = [line for line in epilog.split("\n\n") if line.startswith("offload ")]
    assert examples
    assert all(example in DOCS for example in examples)


def test_one_name_means_one_thing_in_every_command() -> None:
    """Of the same type, and where settings hold it in the same key (tests/test_runconfig.py)."""
    kinds: dict[str, set[str]] = {}
    for info in cli.app.registered_commands:
        assert info.callback is not None
        hints = get_type_hints(info.callback)
        for param in COMMANDS[info.name or info.callback.__name__].params:
            for flag in param.opts:
                kind = str(hints[param.name]).removesuffix(" | None")
                kinds.setdefault(flag, set()).add(kind.removeprefix("<class '").removesuffix("'>"))
    assert kinds["--seed"] == {"int"}
    assert {flag: found for flag, found in kinds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("name", ["finetune", "generate", "plan", "probe"])
def test_what_every_command_has(name: str) -> None:
    flags = {flag for param in COMMANDS[name].params for flag in param.opts}
    common = {"--config", "--dry-run", "--json", "--verbose", "-v", "--quiet", "-q", "--disk"}
    assert common <= flags


def test_what_a_command_without_settings_has() -> None:
    flags = {flag for param in COMMANDS["report"].params for flag in param.opts}
    assert {"--dry-run", "--json", "--verbose", "-v", "--quiet", "-q"} <= flags


@pytest.mark.parametrize(
    ("name", "owner", "keys"),
    [
        ("finetune", RunConfig, finetune_cli.FLAGS),
        ("generate", GenerateConfig, generate_cli.FLAGS),
        ("plan", PlanConfig, plan_cli.FLAGS),
    ],
)
def test_the_defaults_that_are_shown_are_those_that_hold(
    name: str, owner: type, keys: dict[str, str]
) -> None:
    shown = {p.name: p.show_default for p in COMMANDS[name].params if p.name in keys}
    assert shown.keys() == keys.keys()
    for flag, key in keys.items():
        default = default_of(owner, key)
        if default is MISSING:
            assert shown[flag] is True, "required: there is nothing to show"
        elif key == "schedule.warmup":
            assert "a tenth" in shown[flag]  # it depends on the steps
        elif isinstance(default, bool):
            assert shown[flag] == ("yes" if default else "no")
        elif default is not None and default != ():
            assert str(default) in shown[flag].split(";")[0]
