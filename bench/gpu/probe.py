"""Rates of every lane: both directions of the bus alone and together, pinned, pageable and as our
lanes copy; host copies, the disk, the update on the CPU, products in bf16."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu.common import arguments, synchronize
from gpu.runner import line

from offload.tiers import survey
from offload.tiers.copy import Copier, CudaCopier, Mark, PlainCopier

SIZE_BYTES = 1 << 30
TINY_BYTES = 1 << 22


def rate(work: Callable[[], Any], size_bytes: int, rounds: int) -> float:
    """Bytes/s, the median of rounds; the first one warms up."""
    seconds = []
    for _ in range(rounds + 1):
        synchronize()
        began_s = time.perf_counter()
        work()
        synchronize()
        seconds.append(time.perf_counter() - began_s)
    return size_bytes / statistics.median(seconds[1:])


def plain_copies(size_bytes: int, rounds: int, place: str) -> dict[str, float]:
    """torch's own copies: pinned and pageable, each way, and both at once on two streams."""
    device = torch.ones(size_bytes, dtype=torch.uint8, device=place)
    other, pageable = torch.ones_like(device), torch.ones(size_bytes, dtype=torch.uint8)
    found = {
        "pageable_h2d": rate(lambda: device.copy_(pageable), size_bytes, rounds),
        "pageable_d2h": rate(lambda: pageable.copy_(device), size_bytes, rounds),
    }
    if place == "cpu":
        return found
    pinned, back = pageable.pin_memory(), torch.ones_like(pageable).pin_memory()
    up, down = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(up):
            device.copy_(pinned, non_blocking=True)
        with torch.cuda.stream(down):
            back.copy_(other, non_blocking=True)

    return found | {
        "pinned_h2d": rate(lambda: device.copy_(pinned, non_blocking=True), size_bytes, rounds),
        "pinned_d2h": rate(lambda: pinned.copy_(device, non_blocking=True), size_bytes, rounds),
        "pinned_both": rate(both, 2 * size_bytes, rounds),
    }


def our_copies(size_bytes: int, rounds: int, place: str) -> dict[str, float]:
    """As the lanes copy, pageable homes to frames: as they are, and float32 to bf16 on the way."""
    copier: Copier = PlainCopier() if place == "cpu" else CudaCopier(torch.device(place, 0))
    host = torch.ones(size_bytes // 4)
    same, narrow = (torch.ones_like(host, dtype=d, device=place)
                    for d in (torch.float32, torch.bfloat16))  # fmt: skip
    found = {
        "lane_h2d": rate(lambda: copier.upload(host, same, Mark()), size_bytes, rounds),
        "lane_h2d_cast": rate(lambda: copier.upload(host, narrow, Mark()), size_bytes // 2, rounds),
        "lane_d2h": rate(lambda: copier.download(same, host, copier.ready()), size_bytes, rounds),
        "lane_d2h_cast": rate(
            lambda: copier.download(narrow, host, copier.ready()), size_bytes // 2, rounds
        ),
    }
    synchronize()
    copier.close()
    return found


def products(side: int, rounds: int, place: str) -> float:
    """FLOP/s of a square product in bf16."""
    a = torch.randn(side, side, device=place, dtype=torch.bfloat16)
    return rate(lambda: a @ a, 2 * side**3, rounds)


def device(place: str) -> dict[str, Any]:
    """What this is; nothing that names it."""
    told: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    if place == "cpu":
        return told | {"name": "emulated"}
    properties = torch.cuda.get_device_properties(0)
    return told | {
        "name": properties.name, "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda, "threads": torch.get_num_threads(),
    }  # fmt: skip


def main() -> None:
    args = arguments()
    place = "cpu" if args.emulated else "cuda"
    size_bytes = TINY_BYTES if args.emulated else SIZE_BYTES
    line({"device": device(place)})
    copies = plain_copies(size_bytes, args.rounds, place) | our_copies(
        size_bytes, args.rounds, place
    )
    told = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in copies.items())
    line({"bytes_per_s": copies, "says": f"GB/s: {told}"})
    side = 64 if args.emulated else 8192
    line({"product_flops": products(side, args.rounds, place)})
    if args.emulated:
        return
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        line({"survey": survey.survey(Path(folder)).to_dict()})


if __name__ == "__main__":
    main()
