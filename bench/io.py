"""Are the disk rates that bounds are made of honest? Our lanes against fio, in the same minute.

For each of read, write and both at once: our probe (8 MiB blocks through huge-page buffers, in as
little memory as fio's, which a cache may hold: a bound's rates are those of more) and fio at the
same block size, with its default buffers and with huge pages, in shuffled order; medians of several
rounds and same-round ratios. Appends a JSON line to bench/results/io.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from record import append

from offload.tiers.lane import DISK_WORKERS
from offload.tiers.probe import BLOCK_BYTES, probe

KEYS = ("read", "write", "mixed_read", "mixed_write")


def ours(folder: Path, size_bytes: int) -> dict[str, float]:
    """One round of the probe, in bytes per second."""
    machine = probe(folder, size_bytes, rounds=1, memory_bytes=2 * DISK_WORKERS * BLOCK_BYTES)
    return {k: getattr(machine, f"{k}_bytes_per_s") for k in KEYS}


def fio_job(folder: Path, size_bytes: int, kinds: tuple[str, ...], huge: bool) -> list[float]:
    """One fio run with a job per kind, all at once; bytes per second of each."""
    command = [
        "fio", "--output-format=json", "--direct=1", f"--bs={BLOCK_BYTES}", "--ioengine=io_uring",
        f"--iodepth={DISK_WORKERS}", f"--size={size_bytes // len(kinds)}", "--fallocate=none",
        "--overwrite=1", "--group_reporting=0",
    ]  # fmt: skip
    for i, kind in enumerate(kinds):
        command += [f"--name=job{i}", f"--filename={folder / f'fio{i}'}", f"--rw={kind}"]
    env = dict(os.environ)
    if huge:
        env["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return [float(job[kind]["bw_bytes"]) for job, kind in zip(jobs, kinds, strict=True)]


def fio(folder: Path, size_bytes: int, huge: bool) -> dict[str, float]:
    """One round of fio."""
    read = fio_job(folder, size_bytes, ("read",), huge)[0]
    write = fio_job(folder, size_bytes, ("write",), huge)[0]
    mixed = fio_job(folder, size_bytes, ("read", "write"), huge)
    return dict(zip(KEYS, (read, write, *mixed), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if shutil.which("fio") is None:
        print("fio is not installed (Debian: apt-get install fio); nothing to compare with")
        return 2
    args.disk.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.disk))
    size = args.mib << 20
    try:
        for name in ("fio0", "fio1"):  # written once, so that nothing measures allocation
            with (folder / name).open("wb") as out:
                for _ in range(args.mib):
                    out.write(os.urandom(4096) * 256)
                os.fsync(out.fileno())
        engines = {
            "ours": lambda: ours(args.disk, size),
            "fio": lambda: fio(folder, size, huge=False),
            "fio-huge": lambda: fio(folder, size, huge=True),
        }
        rounds: list[dict[str, dict[str, float]]] = []
        for _ in range(args.rounds):
            order = random.sample(list(engines), len(engines))
            rounds.append({name: engines[name]() for name in order})
    finally:
        shutil.rmtree(folder)
    report(rounds, args.disk)
    return 0


def report(rounds: list[dict[str, dict[str, float]]], disk: Path) -> None:
    """Print the table and append the JSON line."""
    medians = {e: {k: statistics.median(r[e][k] for r in rounds) for k in KEYS} for e in rounds[0]}
    ratios = {
        k: statistics.median(r["ours"][k] / max(r["fio"][k], r["fio-huge"][k]) for r in rounds)
        for k in KEYS
    }
    # What a bound uses of the joint rates is the sum of both directions: fio may favour one.
    ratios["mixed_total"] = statistics.median(
        sum(r["ours"][k] for k in KEYS[2:])
        / max(sum(r[e][k] for k in KEYS[2:]) for e in ("fio", "fio-huge"))
        for r in rounds
    )
    print(f"{'GB/s':12}" + "".join(f"{k:>13}" for k in KEYS))
    for engine in ("ours", "fio", "fio-huge"):
        print(f"{engine:12}" + "".join(f"{medians[engine][k] / 1e9:13.2f}" for k in KEYS))
    print(f"{'ours/best':12}" + "".join(f"{ratios[k]:13.2f}" for k in KEYS)
          + f"   both together {ratios['mixed_total']:.2f}")  # fmt: skip
    append(
        "io", disk, medians=medians, ratios=ratios, rounds=len(rounds), block_bytes=BLOCK_BYTES,
        queue=DISK_WORKERS,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
