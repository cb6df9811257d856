"""What all commands share: how they talk, where settings come from, how they end."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload.errors import OffloadError
from offload.settings import InputError, read_yaml, to_yaml

if TYPE_CHECKING:
    from offload.progress import Observer

EXIT_CODES = {
    0: "done",
    1: "an error in offload itself, with its traceback",
    2: "what was asked for cannot work: input, budgets, a full disk; one line on stderr says why",
    3: "offload plan: the job does not fit",
    130: "stopped by Ctrl-C: after the step, or at once by the second",
    143: "stopped by SIGTERM, in the same way",
}


def epilog(*examples: str) -> str:
    """The end of a command's ``--help``. Typer takes paragraphs for lines."""
    codes = "; ".join(f"{code} {what}" for code, what in EXIT_CODES.items())
    return "\n\n".join(["Examples:", *examples, f"Exit status: {codes}."])


@dataclass(slots=True)
class Told:
    """What `end_with` has to know of the command that ran."""

    verbose: bool = False


@dataclass(frozen=True, slots=True)
class Voice:
    """How a command talks."""

    as_json: bool
    verbose: bool
    quiet: bool

    def observer(self) -> Observer:
        """For a run."""
        from offload.progress import choose_observer

        return choose_observer(as_json=self.as_json, verbose=self.verbose, quiet=self.quiet)

    def note(self, text: str) -> None:
        """To people; where stdout is for programs, on stderr."""
        if not self.quiet:
            typer.echo(text, err=self.as_json)


def voice(context: typer.Context, *, as_json: bool, verbose: bool, quiet: bool) -> Voice:
    """As the flags say. Raises InputError where they contradict each other."""
    if verbose and quiet:
        raise InputError("--verbose and --quiet contradict each other; give one of them")
    context.ensure_object(Told).verbose = verbose
    return Voice(as_json, verbose, quiet)


def flags_given(context: typer.Context, flags: Mapping[str, str]) -> dict[str, Any]:
    """``{key path: value}`` of the flags on the command line. ``flags``: their key paths."""
    return {
        flags[name]: value
        for name, value in context.params.items()
        if name in flags and value not in (None, [], ())
    }


def file_values(config_file: str | None, *owners: type) -> dict[str, Any]:
    """What a ``--config`` file of such settings says; nothing without one. Raises InputError."""
    return read_yaml(Path(config_file).expanduser(), *owners) if config_file else {}


def show_plan(told: Voice, config: Any, facts: Mapping[str, Any], lines: list[str]) -> None:
    """What ``--dry-run`` prints: the settings, then what would be done."""
    if told.as_json:
        import json

        typer.echo(json.dumps({"event": "dry-run", "config": asdict(config), **facts}))
        return
    told.note("# the settings in effect, as YAML for --config")
    told.note(to_yaml(config))
    for line in lines:
        told.note(line)
    told.note("nothing was written: this was a dry run")


def quiet_transformers() -> None:
    """Our own lines say what it would say."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read at import
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def end_with(app: typer.Typer) -> None:
    """Run the app: what users can mend is one line on stderr and exit status 2."""
    told = Told()
    try:
        app(standalone_mode=True, prog_name="offload", obj=told)
    except (OffloadError, ValueError, OSError) as error:
        if told.verbose:
            traceback.print_exc()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
