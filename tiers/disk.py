"""The spill file: space reserved at once, O_DIRECT where the file system takes it, checksummed.

The file is unlinked as soon as it is open, so a crash of any kind leaves nothing behind. It is
scratch, never the source of truth: checkpoints are.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from offload.tiers import vm
from offload.tiers.checksum import checksum_of
from offload.tiers.spec import format_size


class DiskFull(OSError):  # noqa: N818 (a condition of the disk)
    """Space for the spill file could not be reserved."""


class Disk(Protocol):
    """What homes know of the disk tier. Transfers are whole pages to and from host addresses."""

    fd: int
    used_bytes: int
    engine: str

    def grow(self, size_bytes: int) -> int:
        """Reserve more space; returns its offset. Raises DiskFull."""
        ...

    def read(self, address: int, size_bytes: int, offset: int) -> int:
        """Fill memory from the file; returns the checksum of what arrived. Raises OSError."""
        ...

    def write(self, address: int, size_bytes: int, offset: int) -> int:
        """Write memory to the file; returns the checksum of what was written. Raises OSError."""
        ...

    def foreign_write(self) -> bool:
        """True when somebody wrote through a mapping since the last call or own write."""
        ...

    def close(self) -> None:
        """Close the descriptors; live mappings stay valid."""
        ...


class SpillFile:
    """One unlinked file in a private folder, read and written around the page cache.

    ``limit_bytes``: the disk budget, or None. ``announce``: told in one line when O_DIRECT is
    refused or not coherent with mappings, and buffered I/O is used.
    """

    def __init__(
        self, folder: Path, limit_bytes: int | None = None, announce: Callable[[str], None] = print
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix="offload-", dir=folder))  # 0700
        path = private / "spill"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.folder = folder
        self.used_bytes = 0
        self.fd = os.open(path, flags, 0o600)
        self.limit_bytes = limit_bytes
        self._direct_fd = _open_direct(path)
        self._last_change_ns = 0
        self._writing = 0
        self._foreign = False
        self._lock = threading.Lock()
        path.unlink()
        private.rmdir()
        self.engine = self._choose_engine(announce)
        self._closer = weakref.finalize(self, _close_all, self.fd, self._direct_fd)

    def grow(self, size_bytes: int) -> int:
        offset = self.used_bytes
        if self.limit_bytes is not None and offset + size_bytes > self.limit_bytes:
            raise DiskFull(
                errno.EDQUOT,
                f"disk_memory is {format_size(self.limit_bytes)} but the spill file needs "
                f"{format_size(offset + size_bytes)}",
            )
        stat = os.fstatvfs(self.fd)
        free_bytes = stat.f_bavail * stat.f_frsize
        try:
            if size_bytes > free_bytes:
                raise OSError(errno.ENOSPC, "no space")
            os.posix_fallocate(self.fd, offset, size_bytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise DiskFull(
                error.errno,
                f"{self.folder} has {format_size(free_bytes)} free but the spill file needs "
                f"{format_size(size_bytes)} more; choose another disk=... folder or a "
                "larger host_memory",
            ) from error
        self.used_bytes += size_bytes
        self._last_change_ns = self._changed_ns()
        return offset

    def pull(self, address: int, size_bytes: int, offset: int) -> None:
        """File to memory, nothing else: what ``read`` adds to this is the checksum."""
        memory = vm.buffer_at(address, size_bytes)
        _whole(os.preadv, self._io_fd, memoryview(memory).cast("B"), offset)

    def push(self, address: int, size_bytes: int, offset: int) -> None:
        """Memory to file, nothing else."""
        memory = vm.buffer_at(address, size_bytes)
        _whole(os.pwritev, self._io_fd, memoryview(memory).cast("B"), offset)

    def read(self, address: int, size_bytes: int, offset: int) -> int:
        self.pull(address, size_bytes, offset)
        return checksum_of(address, size_bytes)

    def write(self, address: int, size_bytes: int, offset: int) -> int:
        with self._lock:
            self._look()
            self._writing += 1
        # The checksum comes first: if memory changes meanwhile the file disagrees with it, which
        # the next read reports.
        checksum = checksum_of(address, size_bytes)
        try:
            self.push(address, size_bytes, offset)
        finally:
            with self._lock:
                self._writing -= 1
                self._last_change_ns = max(self._changed_ns(), self._last_change_ns)
        return checksum

    def foreign_write(self) -> bool:
        with self._lock:
            self._look()
            foreign, self._foreign = self._foreign, False
        return foreign

    def close(self) -> None:
        self._closer()

    @property
    def _io_fd(self) -> int:
        return self._direct_fd if self._direct_fd is not None else self.fd

    def _changed_ns(self) -> int:
        return os.fstat(self.fd).st_mtime_ns

    def _look(self) -> None:
        """Compare the file's time with that after our own last write. Called under the lock.

        While a write of ours is in flight the time says nothing; the engine therefore awaits
        its writes before user code runs.
        """
        if self._writing == 0:
            changed_ns = self._changed_ns()
            self._foreign |= changed_ns > self._last_change_ns
            self._last_change_ns = changed_ns

    def _choose_engine(self, announce: Callable[[str], None]) -> str:
        if self._direct_fd is not None and _coherent(self.fd, self._direct_fd):
            os.ftruncate(self.fd, 0)
            return "O_DIRECT"
        if self._direct_fd is not None:
            os.close(self._direct_fd)
            self._direct_fd = None
        os.ftruncate(self.fd, 0)
        announce(f"{self.folder}: O_DIRECT is refused here, using buffered I/O (slower)")
        return "buffered"


def _open_direct(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (OSError, AttributeError):
        return None


def _close_all(*fds: int | None) -> None:
    for fd in fds:
        if fd is not None:
            os.close(fd)


def _whole(
    move: Callable[[int, list[memoryview], int], int], fd: int, memory: memoryview, offset: int
) -> None:
    """Repeat a vectored transfer until all of it is done; a short end of file is an error."""
    done = 0
    while done < len(memory):
        count = move(fd, [memory[done:]], offset + done)
        if count == 0:
            missing = len(memory) - done
            raise OSError(errno.EIO, f"spill file ends at {offset + done}, {missing} short")
        done += count


def _coherent(fd: int, direct_fd: int) -> bool:
    """Whether direct I/O and a shared mapping see each other's writes on this file system."""
    size = vm.HUGE_BYTES
    frame, view = vm.reserve(size), vm.reserve(size)
    try:
        os.posix_fallocate(fd, 0, size)
        vm.map_file(view, size, fd, 0)
        for byte in (0x5A, 0xA5):
            vm.fill(frame, size, byte)
            if os.pwritev(direct_fd, [vm.buffer_at(frame, size)], 0) != size:
                return False
            if vm.buffer_at(view, 1).raw[0] != byte:
                return False
            vm.fill(view + vm.PAGE_BYTES, vm.PAGE_BYTES, byte ^ 0xFF)
            if os.preadv(direct_fd, [vm.buffer_at(frame, size)], 0) != size:
                return False
            if vm.buffer_at(frame + vm.PAGE_BYTES, 1).raw[0] != byte ^ 0xFF:
                return False
    except OSError:
        return False
    finally:
        vm.release(frame, size)
        vm.release(view, size)
    return True
