"""The list of a checkpoint's files: written last, read first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from offload.errors import CheckpointError
from offload.stsafe import FileRecord, HashingReader, HashingWriter, damaged

NAME = "manifest.json"
FORMAT = "offload checkpoint"
VERSION = 1


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a checkpoint, whole or damaged."""
    return (path / NAME).is_file()


def write_manifest(folder: Path, files: Mapping[str, FileRecord], helper: Executor) -> None:
    """Seal a checkpoint: sizes and hashes of all other files, and a hash of that list."""
    table = {k: {"bytes": f.size_bytes, "sha256": f.sha256} for k, f in sorted(files.items())}
    content = {"format": FORMAT, "version": VERSION, "files": table, "sha256": _digest(table)}
    write_json(folder / NAME, content, helper)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint, all there and of the right size. Raises CheckpointError."""
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no {NAME}"
            if folder.exists()
            else f"there is no checkpoint at {folder}; give the directory that save() was given"
        )
    try:
        content = json.loads(path.read_bytes())
        kind, version, table = content["format"], content["version"], content["files"]
        whole = content["sha256"] == _digest(table)
        files = {k: FileRecord(int(v["bytes"]), str(v["sha256"])) for k, v in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"cannot be understood ({error})") from error
    if kind != FORMAT or not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path} says {kind!r} version {version}, this is version {VERSION}: "
            "load it with the version of offload that saved it"
        )
    if not whole:
        raise damaged(path, "has another sha256 than it says")
    for name, record in files.items():
        _check_size(folder, name, record)
    return files


def write_json(path: Path, content: Any, helper: Executor) -> FileRecord:
    """A small durable JSON file."""
    writer = HashingWriter(path, helper)
    try:
        writer.write(json.dumps(content, indent=1, allow_nan=False).encode())
        return writer.finish()
    finally:
        writer.close()


def read_json(path: Path, record: FileRecord) -> Any:
    """A JSON file whose hash is right. Raises CheckpointError."""
    with HashingReader(path, record) as reader:
        text = reader.read(record.size_bytes)
        reader.finish()
    return json.loads(text)


def _check_size(folder: Path, name: str, record: FileRecord) -> None:
    path = folder / name
    if Path(name).name != name:
        raise damaged(folder / NAME, f"names a file outside the checkpoint: {name}")
    if not path.is_file():
        raise damaged(path, "is missing")
    if path.stat().st_size != record.size_bytes:
        raise damaged(path, f"has {path.stat().st_size} bytes instead of {record.size_bytes}")


def _digest(table: Any) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
