"""The command: ``scripts/gpu_check``. Needs no torch of its own; its tasks do."""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from gpu.parts import Catalogue
from gpu.runner import Part, State, run_part
from record import RESULTS, machine

ROOT = Path(__file__).parents[2]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/gpu_check", description=__doc__)
    parser.add_argument("--part", type=int, action="append", help="only this one; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a cross-section instead of parts")
    parser.add_argument("--list", action="store_true", help="show the parts and how far they are")
    parser.add_argument("--again", action="store_true", help="also what is finished")
    parser.add_argument("--out", type=Path, default=Path("gpu-out"), help="logs, reports, traces")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install into --out first")
    parser.add_argument("--minutes", type=float, default=9.0, help="of one part, at most 9")
    parser.add_argument("--host-gb", type=float, help="what the host is taken to have; measured")
    parser.add_argument("--bundle", type=Path, help="what is worth keeping, as one .tgz")
    parser.add_argument("--emulated", action="store_true", help="tiny shapes, no GPU")
    args = parser.parse_args(given)
    args.minutes = min(args.minutes, 9.0)
    return args


def environment(out: Path) -> dict[str, str]:
    """Tasks import this checkout, its benchmarks and what was installed from wheels."""
    paths = [str(ROOT), str(ROOT / "bench"), str(out / "site"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # read once, when cuBLAS starts
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def install(wheels: Path, out: Path) -> None:
    """Put carried wheels where tasks find them; nothing is fetched."""
    found = sorted(glob.glob(str(wheels / "*.whl")))
    if found:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--upgrade",
             "--target", str(out / "site"), *found], check=False,
        )  # fmt: skip


def show(parts: list[Part], state: State) -> None:
    """What there is, and how far it is."""
    for part in parts:
        over = sum(state.over(part, task) for task in part.tasks)
        print(f"{part.number:2} {part.name:14} {over} of {len(part.tasks)} done   {part.title}")


def write(parts: list[Part], state: State, args: argparse.Namespace) -> Path:
    """All that is known until now as one file."""
    results, device = args.results, device_of(parts, state, args.emulated)
    name = str(device["name"]).lower().replace(" ", "-")
    file = results / f"{name}-{time.strftime('%Y-%m-%d')}.json"
    found = {
        part.name: {task.name: state.get(part, task) for task in part.tasks
                    if state.get(part, task)["status"]}
        for part in parts
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    there = machine() | {"taken_to_have_gb": args.host_gb}
    told = json.dumps({"device": device, "machine": there, "parts": found}, indent=1)
    for path, name in ((state.folder, "OUT"), (ROOT, "REPO"), (sys.prefix, "PYTHON")):
        told = told.replace(str(path), name)  # errors name files of this machine
    file.write_text(told)
    return file


def bundle(file: Path, out: Path, results: Path) -> None:
    """Everything to carry away; the file is whole at every moment. No temporary files of tasks."""
    fresh = file.with_name(file.name + ".new")
    with tarfile.open(fresh, "w:gz") as kept:
        for name in ("state.json", "logs", "reports"):
            if (out / name).exists():
                kept.add(out / name, f"{out.name}/{name}")
        kept.add(results, f"results/{results.name}")
    fresh.replace(file)
    _say(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def device_of(parts: list[Part], state: State, emulated: bool) -> dict[str, object]:
    """What the probe has seen of the GPU."""
    for part in parts:
        for task in part.tasks:
            for row in state.get(part, task)["rows"]:
                if "device" in row:
                    return dict(row["device"])
    return {"name": "emulated" if emulated else "gpu"}


def main(given: list[str] | None = None, parts: list[Part] | None = None) -> int:
    """0: all went well; 1: something failed or was cut."""
    args = arguments(given)
    out = args.out.absolute()
    state = State.of(out)
    catalogue = Catalogue(out, emulated=args.emulated, host_gb=args.host_gb)
    parts = parts or [*catalogue.parts(), catalogue.quick()]
    if args.list:
        show(parts, state)
        return 0
    if args.wheels is not None:
        install(args.wheels, args.out)
    good = True
    for part in parts:
        if part.number not in wanted(args, parts):
            continue
        if args.again:
            state.forget(part)
        if state.finished(part):
            print(f"part {part.number} {part.name}: finished already", flush=True)
            continue
        print(f"part {part.number} {part.name}: {part.title}", flush=True)
        part = Part(part.number, part.name, part.title, part.tasks,
                    min(part.limit_s, 60 * args.minutes))  # fmt: skip
        good &= run_part(part, state, environment(out), _say)
        file = write(parts, state, args)
        if args.bundle is not None:  # after each part: a borrowed machine's time ends when it ends
            bundle(args.bundle, out, file)
    return 0 if good else 1


def wanted(args: argparse.Namespace, parts: list[Part]) -> list[int]:
    """Numbers of the parts to run: those asked for, else all but the cross-section (0)."""
    asked = [*(args.part or []), *([0] if args.quick else [])]
    return asked or [part.number for part in parts if part.number]


def _say(line: str) -> None:
    print(line, flush=True)
