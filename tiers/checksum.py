"""The checksum of bytes on their way to and from disk."""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from offload.tiers import vm


def checksum_of(address: int, size_bytes: int) -> int:
    """xxh3 (64 bits) of a range of memory. The GIL is released meanwhile."""
    return int(xxh3_64_intdigest(vm.buffer_at(address, size_bytes)))
