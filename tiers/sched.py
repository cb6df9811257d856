"""How soon a thread gets a processor that others keep busy. Linux only.

A lane's worker needs a processor for microseconds at a time, and what it does next (order the next
read, sum up what came) holds up a whole transfer. Beside as many computing threads as there are
processors it gets one when the slice of one of these ends: milliseconds later. Since Linux 6.12 a
thread may ask for slices of its own length, and one that asks for short ones is let in at
once. It takes no larger share of the processors by that, and needs no privilege.
"""

from __future__ import annotations

import ctypes
import os
import struct

SLICE_NS = 100_000  # the least that Linux grants
# sched_getattr and sched_setattr have no wrapper in the C libraries that we run on.
_CALLS = {"x86_64": (315, 314), "aarch64": (275, 274)}
_FIELDS = struct.Struct("=IIQiIQQQII")  # struct sched_attr
_POLICY, _RUNTIME = 1, 5  # of these
_libc = ctypes.CDLL(None, use_errno=True)


def slice_ns() -> int:
    """The calling thread's slice in nanoseconds; 0 where the kernel does not say."""
    found = _attributes()
    return found[_RUNTIME] if found is not None else 0


def ask_for_short_slices() -> None:
    """Have the calling thread let in quickly. Where that cannot be had it costs time alone."""
    found = _attributes()
    if found is None or found[_POLICY] != os.SCHED_OTHER:
        return  # whoever set another policy knows why
    found[_RUNTIME] = SLICE_NS
    wanted = ctypes.create_string_buffer(_FIELDS.pack(*found), _FIELDS.size)
    _libc.syscall(_CALLS[os.uname().machine][1], 0, wanted, 0)


def _attributes() -> list[int] | None:
    """The calling thread's scheduling, its niceness among it."""
    calls = _CALLS.get(os.uname().machine)
    found = ctypes.create_string_buffer(_FIELDS.size)
    if calls is None or _libc.syscall(calls[0], 0, found, _FIELDS.size, 0) != 0:
        return None
    return list(_FIELDS.unpack(found.raw))
