"""The ``offload`` command: the list of its commands. What is slow to import they import inside."""

from __future__ import annotations

from typing import Annotated

try:
    import typer
    from typer import Option
except ModuleNotFoundError as missing:
    raise SystemExit(
        "error: the command needs more packages: pip install 'offload[cli]'"
    ) from missing

from offload import __version__, finetune_cli, generate_cli, plan_cli, probe_cli
from offload.command import end_with, epilog
from offload.report_cli import report

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train and run models larger than memory, on one machine.",
    epilog=epilog("offload finetune --help", "offload --install-completion"),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


app.command(epilog=finetune_cli.EPILOG)(finetune_cli.finetune)
app.command(epilog=generate_cli.EPILOG)(generate_cli.generate)
app.command(epilog=plan_cli.EPILOG)(plan_cli.plan)
app.command(epilog=probe_cli.EPILOG)(probe_cli.probe)
app.command(
    epilog=epilog(
        "offload report runs/mine",
        "offload report rows.jsonl",
        "offload report runs/a runs/b --output compared.html",
    )
)(report)


def main() -> None:
    """Entry point; for exit statuses see `offload.command.EXIT_CODES`."""
    end_with(app)
