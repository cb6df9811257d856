"""Safetensors files, streamed: written and read piece by piece, hashed on the way.

The format is that of https://github.com/huggingface/safetensors: eight bytes of header length,
a JSON header, then the tensors' bytes without gaps. The library itself writes from tensors that
are whole in memory and does not fsync, so files are written here; it reads what is written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from offload.errors import CheckpointError
from offload.tiers.spec import KIB, MIB, round_up

HEADER_LIMIT_BYTES = 100_000_000  # the library's own limit
HEADER_ALIGN_BYTES = 64  # tensors then stand aligned for whoever maps the file
FLUSH_BYTES = 32 * MIB  # how much may stand in the page cache before it is pushed out
VERIFY_BYTES = 64 * KIB  # buffer of one verifying thread: the smallest budgets have this much
SMALL_BYTES = 64 * KIB  # below this a second thread costs more than it hides

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor as a file describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be to be whole."""

    size_bytes: int
    sha256: str


def code_of(name: str, dtype: torch.dtype) -> str:
    """The format's name of a dtype. Raises CheckpointError where it has none."""
    if dtype not in _CODES:
        raise CheckpointError(
            f"{name} has dtype {dtype}, which safetensors files cannot hold; convert it first"
        )
    return _CODES[dtype]


def shard(specs: Iterable[Spec], limit_bytes: int) -> list[list[Spec]]:
    """Split tensors into files of at most ``limit_bytes``; a larger tensor gets its own.

    Within a file wider elements come first, so that every tensor is aligned to its element.
    """
    shards: list[list[Spec]] = []
    room = 0
    for spec in specs:
        if not shards or spec.size_bytes > room:
            shards.append([])
            room = limit_bytes
        shards[-1].append(spec)
        room -= spec.size_bytes
    return [sorted(s, key=lambda spec: -spec.dtype.itemsize) for s in shards]


def header_of(specs: Sequence[Spec]) -> bytes:
    """The file's first bytes: length and JSON header, padded with spaces as the format allows."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        table[spec.name] = {
            "dtype": code_of(spec.name, spec.dtype),
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.size_bytes],
        }
        at += spec.size_bytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    padded = round_up(8 + len(text), HEADER_ALIGN_BYTES) - 8
    return padded.to_bytes(8, "little") + text.ljust(padded)


class HashingWriter:
    """A new file that is written once from start to end, its sha256 taken meanwhile.

    ``helper`` hashes large blocks while they are being written. Pages are pushed out and
    forgotten as they come, so that a save does not fill the page cache. Raises OSError.
    """

    def __init__(self, path: Path, helper: Executor) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags, 0o666)
        self._helper = helper
        self._sha = hashlib.sha256()
        self._size_bytes = 0
        self._unflushed_bytes = 0

    def write(self, block: bytes | memoryview) -> None:
        """Append; the block may be changed when this returns."""
        with memoryview(block) as view:
            large = len(view) >= SMALL_BYTES
            hashing = self._helper.submit(self._sha.update, view) if large else None
            try:
                self._append(view)
            finally:
                if hashing is not None:
                    hashing.result()
                else:
                    self._sha.update(view)

    def finish(self) -> FileRecord:
        """Make the file durable and close it."""
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()
        return FileRecord(self._size_bytes, self._sha.hexdigest())

    def close(self) -> None:
        """Close without promising anything."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])
        self._size_bytes += len(view)
        self._unflushed_bytes += len(view)
        if self._unflushed_bytes >= FLUSH_BYTES:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._unflushed_bytes = 0


class HashingReader:
    """A file read once from start to end, its sha256 compared when the end is reached.

    Raises CheckpointError, naming the file, when it is short, long, or not what was written.
    """

    def __init__(self, path: Path, expected: FileRecord) -> None:
        self._path = path
        self._expected = expected
        self._sha = hashlib.sha256()
        self._at = 0
        self._ahead = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise damaged(path, f"cannot be opened ({error.strerror})") from error
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def __enter__(self) -> HashingReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def left_bytes(self) -> int:
        """What is still to be read."""
        return self._expected.size_bytes - self._at

    def read_into(self, block: memoryview) -> None:
        """Fill the block with the bytes that come next."""
        done = 0
        while done < len(block):
            try:
                count = os.preadv(self._fd, [block[done:]], self._at + done)
            except OSError as error:
                raise damaged(self._path, f"cannot be read ({error.strerror})") from error
            if count == 0:
                raise damaged(self._path, f"ends at byte {self._at + done}")
            done += count
        self._at += done
        self._advise()
        self._sha.update(block)

    def _advise(self) -> None:
        """Have the kernel read ahead while this thread hashes, and forget what lies behind."""
        if self._at + FLUSH_BYTES // 2 > self._ahead:
            self._ahead = self._at + FLUSH_BYTES
            os.posix_fadvise(self._fd, self._at, FLUSH_BYTES, os.POSIX_FADV_WILLNEED)
            os.posix_fadvise(self._fd, 0, self._at, os.POSIX_FADV_DONTNEED)

    def read(self, size_bytes: int) -> bytes:
        """The next bytes, as an object."""
        block = bytearray(size_bytes)
        self.read_into(memoryview(block))
        return bytes(block)

    def read_header(self) -> tuple[Spec, ...]:
        """The tensors of a safetensors file in the order of their bytes, which follow."""
        return parse_header(self._path, self._expected.size_bytes, self.read)

    def finish(self) -> None:
        """Read what is left, and compare."""
        block = memoryview(bytearray(VERIFY_BYTES))
        while self.left_bytes:
            self.read_into(block[: min(self.left_bytes, VERIFY_BYTES)])
        if self._sha.hexdigest() != self._expected.sha256:
            raise damaged(self._path, "has another sha256 than the manifest says")


def parse_header(path: Path, size_bytes: int, read: Callable[[int], bytes]) -> tuple[Spec, ...]:
    """Check a header as strictly as the format demands. ``read(n)`` gives the next n bytes."""
    if size_bytes < 8:
        raise damaged(path, "is too short for a safetensors file")
    length = int.from_bytes(read(8), "little")
    if length > min(HEADER_LIMIT_BYTES, size_bytes - 8):
        raise damaged(path, f"has a header of {length} bytes")
    try:
        table = json.loads(read(length))
        table.pop("__metadata__", None)
        rows = sorted((tuple(v["data_offsets"]), k, v) for k, v in table.items())
        specs = tuple(Spec(k, DTYPES[v["dtype"]], tuple(v["shape"])) for _, k, v in rows)
        at = 0
        for ((start, stop), _, _), spec in zip(rows, specs, strict=True):
            if start != at or stop - start != spec.size_bytes or min(spec.shape, default=0) < 0:
                raise ValueError(f"{spec.name} at {start}:{stop}")
            at = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"has a header that makes no sense ({error})") from error
    if at != size_bytes - 8 - length:
        raise damaged(path, "has bytes that belong to no tensor")
    return specs


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file that is not what was saved."""
    return CheckpointError(
        f"checkpoint file {path} {what}: the checkpoint is damaged; load an earlier one"
    )


def no_space(error: OSError) -> bool:
    """Whether an error means that the disk, or a quota on it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
