"""``offload probe``: what this machine can do, measured, printed and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offload import options
from offload.command import Voice, epilog, file_values
from offload.command import voice as voice_of
from offload.runconfig import MemoryConfig, RunConfig
from offload.settings import convert

if TYPE_CHECKING:
    from offload.tiers.survey import Pair, Survey

EPILOG = epilog(
    "offload probe --disk /scratch", "offload probe --config runs/mine/config.yaml --json"
)


def probe(
    context: typer.Context,
    config: options.Config = None,
    disk: options.ProbedDisk = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure each lane alone, and the pairs that share something; remember the result.

    Disk read with disk write, memory copy with update, the disk with products on all cores, and
    the two directions of the link to a GPU where there is one. Plans are then made from these
    rates. Of a ``--config`` file only memory.disk is used.
    """
    voice = voice_of(context, as_json=as_json, verbose=verbose, quiet=quiet)
    told = file_values(config, RunConfig).get("memory.disk")
    named = disk or convert(MemoryConfig, "disk", told, "memory.disk") or "."
    folder = Path(named).expanduser()
    if dry_run:
        _dry_run(folder, voice)
        return
    from offload.tiers.survey import remember, survey

    found = survey(folder)
    kept = remember(folder, found)
    if as_json:
        where = str(kept) if kept else None
        typer.echo(json.dumps(found.to_dict() | {"kept_in": where}))
        return
    if not quiet:
        _show(found)
    voice.note(f"kept in {kept}" if kept else "it could not be kept: there is no cache folder")


def _dry_run(folder: Path, voice: Voice) -> None:
    from offload.settings import InputError
    from offload.tiers.survey import surveyed_at
    from offload.writable import check_writable, nearest

    try:
        check_writable(folder, dry=True)
    except OSError as error:
        raise InputError(
            f"cannot write in {folder}: {error.strerror}; choose another --disk"
        ) from error
    facts = {"disk": str(folder), "kept_in": str(surveyed_at(nearest(folder)))}
    if voice.as_json:
        typer.echo(json.dumps({"event": "dry-run", **facts}))
        return
    voice.note(f"would measure for some ten seconds, with a file of 512 MiB in {folder}")
    voice.note(f"would keep the result in {facts['kept_in']}")
    voice.note("nothing was written: this was a dry run")


def _show(found: Survey) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("lane", "alone", "beside it", "the other")
    for pair in found.pairs:
        for row in _rows(pair):
            table.add_row(*row)
    share = found.machine.beside_share
    table.add_row("disk, any direction", "", f"{share:.0%}", "products or update on all cores")
    table.add_row("product, float32", f"{found.product_flops_per_s / 1e9:.1f} GFLOP/s", "", "")
    console = Console()
    console.print(table)
    device = found.device or "no GPU"
    console.print(f"{found.threads} threads of torch; {device}", highlight=False)


def _rows(pair: Pair) -> list[tuple[str, ...]]:
    def said(per_s: float, unit: str) -> str:
        return f"{per_s / 1e9:.2f} GB/s" if unit == "B" else f"{per_s / 1e6:.0f} M {unit}/s"

    found: list[tuple[Any, ...]] = list(
        zip(pair.lanes, pair.units, pair.alone_per_s, pair.beside_per_s, strict=True)
    )
    return [
        (lane, said(alone, unit), f"{said(beside, unit)} ({beside / alone:.0%})", other)
        for (lane, unit, alone, beside), other in zip(found, reversed(pair.lanes), strict=True)
    ]
