"""Virtual memory by ctypes: reserve, back with huge pages or a file, move pages. Linux only.

[Note: pages move, addresses do not]
A *home* is an address range that tensors point into for the whole run. Its backing changes: the
spill file's mapping (evicted), or anonymous huge pages (resident). ``mremap`` moves the pages of
a frame onto the home in microseconds, without copying. Moves are made with MREMAP_DONTUNMAP so
that neither side is ever a hole another mapping could fall into.
"""

from __future__ import annotations

import ctypes
import os
import re

from offload.tiers.spec import MIB, round_up

HUGE_BYTES = 2 * MIB
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_READ_WRITE = 0x1 | 0x2
_SHARED, _PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MAYMOVE, _MOVE_FIXED, _DONTUNMAP = 1, 2, 4
_ADVISE_RANDOM, _ADVISE_HUGEPAGE = 1, 14
_FAILED = ctypes.c_void_p(-1).value
_LOWEST_BIT = bytes(v & 1 for v in range(256))  # of a mincore byte: cached or not

# Calls of microseconds keep the GIL: giving it up costs a hand-over to a lane worker and back,
# ten times the call. What may take milliseconds gives it up.
_libc = ctypes.PyDLL(None, use_errno=True)
_slow = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.mremap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _check(result: int | None, what: str) -> int:
    if result is None or result in (-1, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def reserve(size_bytes: int) -> int:
    """Address of ``size_bytes`` of anonymous memory, 2 MiB aligned, not yet backed by pages."""
    flags = _PRIVATE | _ANONYMOUS | _NORESERVE
    span = round_up(size_bytes, PAGE_BYTES) + HUGE_BYTES
    raw = _check(_libc.mmap(None, span, _READ_WRITE, flags, -1, 0), "mmap")
    base = round_up(raw, HUGE_BYTES)
    end = base + round_up(size_bytes, PAGE_BYTES)
    if base > raw:
        release(raw, base - raw)
    if raw + span > end:
        release(end, raw + span - end)
    return base


def want_huge(address: int, size_bytes: int) -> bool:
    """Ask for huge pages; False where the kernel was built or booted without them."""
    return bool(_libc.madvise(address, size_bytes, _ADVISE_HUGEPAGE) == 0)


def release(address: int, size_bytes: int) -> None:
    """Unmap the range."""
    _check(_libc.munmap(address, size_bytes), "munmap")


def map_file(address: int, size_bytes: int, fd: int, offset: int) -> None:
    """Put the file's range at this address, replacing what is mapped there, in one call."""
    flags = _SHARED | _FIXED
    _check(_libc.mmap(address, size_bytes, _READ_WRITE, flags, fd, offset), "mmap of spill file")


def expect_sparse_reads(address: int, size_bytes: int) -> None:
    """Switch readahead off: a few rows of an embedding should not drag in megabytes."""
    _libc.madvise(address, size_bytes, _ADVISE_RANDOM)


def return_freed_memory() -> None:
    """Have malloc give pages of freed blocks back to the system.

    glibc keeps the pages of freed activations and gradients for later: memory that no budget
    would see, while chunks take the room that the ledger says is free. Other allocators have
    no such call, and are left alone.
    """
    trim = getattr(_slow, "malloc_trim", None)
    if trim is not None:
        trim(0)


def map_anonymous(address: int, size_bytes: int) -> None:
    """Put fresh zero pages at this address, replacing what is mapped there."""
    flags = _PRIVATE | _ANONYMOUS | _FIXED | _NORESERVE
    _check(_libc.mmap(address, size_bytes, _READ_WRITE, flags, -1, 0), "mmap")


def take_cached(source: int, target: int, size_bytes: int) -> bool:
    """Copy the pages of a file mapping that are in the page cache; whether there were any.

    What is there somebody touched, and is what the file's users see, whatever the disk holds.
    """
    pages = -(-size_bytes // PAGE_BYTES)
    seen = (ctypes.c_ubyte * pages)()
    _check(_libc.mincore(source, size_bytes, seen), "mincore")
    runs = list(re.finditer(rb"\x01+", bytes(seen).translate(_LOWEST_BIT)))
    for run in runs:
        start, stop = (page * PAGE_BYTES for page in run.span())
        ctypes.memmove(target + start, source + start, min(stop, size_bytes) - start)
    return bool(runs)


def move_pages(source: int, target: int, size_bytes: int) -> None:
    """Move anonymous pages from source to target; source stays mapped and empty.

    Kernels before 5.7 lack DONTUNMAP: there the source is mapped anew, after a short hole.
    """
    how = _MAYMOVE | _MOVE_FIXED
    moved = _libc.mremap(source, size_bytes, size_bytes, how | _DONTUNMAP, target)
    if moved in (None, -1, _FAILED):
        _check(_libc.mremap(source, size_bytes, size_bytes, how, target), "mremap")
        map_anonymous(source, size_bytes)


def buffer_at(address: int, size_bytes: int) -> ctypes.Array[ctypes.c_char]:
    """A writable buffer object over the range; it keeps nothing alive."""
    return (ctypes.c_char * size_bytes).from_address(address)


def fill(address: int, size_bytes: int, byte: int) -> None:
    """Set every byte of the range."""
    ctypes.memset(address, byte, size_bytes)
