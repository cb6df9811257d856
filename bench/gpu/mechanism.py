"""Frames or mapping? What one 16 to 64 MiB chunk costs under each device mechanism, without copies.

Frames: torch's allocator hands out a buffer, or an idle frame is taken, and a tensor is made over
it. Mapping (cuda-bindings): physical pages are mapped at a fixed address (cuMemMap, cuMemSetAccess)
and unmapped again, pages being reused or made anew; whether torch takes such an address.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu.common import arguments
from gpu.runner import line

from offload.tiers.arena import CudaMemory, DeviceArena

MIB = 1 << 20
SIZES = (16 * MIB, 64 * MIB)


def each_s(work: Callable[[], Any], count: int = 200) -> float:
    """Median seconds of one, the device idle before and after."""
    work()
    seconds = []
    for _ in range(count):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    return statistics.median(seconds)


def frames(size_bytes: int) -> dict[str, float]:
    """Seconds of what the arena does for a chunk."""
    arena = DeviceArena(CudaMemory(torch.device("cuda", 0)))

    def reused() -> None:
        frame = arena.take(size_bytes)
        arena.assign(frame, 0)
        arena.lend(frame)
        arena.give(frame)

    def anew() -> None:
        reused()
        arena.trim()

    found = {"frame_reused_s": each_s(reused), "frame_from_allocator_s": each_s(anew)}
    arena.close()
    return found


class Mapping:
    """One reserved range of addresses and one physical allocation, through the driver."""

    def __init__(self, size_bytes: int) -> None:
        from cuda.bindings import driver

        torch.zeros(1, device="cuda")  # the primary context
        self._driver = driver
        self.size_bytes = size_bytes
        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = 0
        self._kind = driver.CUmemAllocationProp()
        self._kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location = location
        self._access = driver.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.address = self._call(driver.cuMemAddressReserve, size_bytes, 0, 0, 0)
        self.pages = self.create()

    def create(self) -> Any:
        return self._call(self._driver.cuMemCreate, self.size_bytes, self._kind, 0)

    def map(self, pages: Any) -> None:
        self._call(self._driver.cuMemMap, self.address, self.size_bytes, 0, pages, 0)
        self._call(self._driver.cuMemSetAccess, self.address, self.size_bytes, [self._access], 1)

    def unmap(self) -> None:
        self._call(self._driver.cuMemUnmap, self.address, self.size_bytes)

    def release(self, pages: Any) -> None:
        self._call(self._driver.cuMemRelease, pages)

    def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        code, *values = function(*args)
        if int(code):
            raise RuntimeError(f"{function.__name__}: {code}")
        return values[0] if values else None


def mapping(size_bytes: int) -> dict[str, Any]:
    """Seconds of a map and an unmap, and whether torch computes right at such an address."""
    found = Mapping(size_bytes)

    def reused() -> None:
        found.map(found.pages)
        found.unmap()

    def anew() -> None:
        pages = found.create()
        found.map(pages)
        found.unmap()
        found.release(pages)

    told: dict[str, Any] = {"map_reused_s": each_s(reused), "map_anew_s": each_s(anew, 50)}
    found.map(found.pages)
    memory = CudaMemory(torch.device("cuda", 0))
    tensor = memory.over(int(found.address), size_bytes, None)
    tensor.fill_(3)
    told["torch_takes_it"] = int(tensor.to(torch.int64).sum()) == 3 * size_bytes
    del tensor
    torch.cuda.synchronize()
    found.unmap()
    return told


def main() -> None:
    arguments()
    for size_bytes in SIZES:
        row: dict[str, Any] = {"size_bytes": size_bytes} | frames(size_bytes)
        line(row)
        try:
            row = mapping(size_bytes)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        line({"size_bytes": size_bytes, **row})


if __name__ == "__main__":
    main()
