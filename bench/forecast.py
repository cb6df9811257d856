"""Is the forecast of `offload plan --task finetune` right? Peaks, bytes moved and seconds, foretold
and measured, one case after the other on a machine that each has to itself.

The disk is probed anew and the small run of the same kind is made anew, so that nothing is foretold
from rates of another minute; then the job itself runs in a process of its own. Peaks are those of
the ledger (tiers.host.peak_bytes); seconds are the median of steps behind the fifth.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from record import append
from transformers import LlamaConfig

from offload.blueprint import FineTune, build, optimizer_of
from offload.effort import as_dict, measure, sample_for
from offload.forecast import Answer, Forecaster
from offload.machines import Site
from offload.prefetch.trace import Phase
from offload.tiers.probe import probe_machine
from offload.tiers.spec import MIB, Budget, Machine, parse_size

WARM_STEPS = 9

# hidden, layers, intermediate, vocabulary; job; budget
CASES: dict[str, tuple[tuple[int, int, int, int], FineTune, str]] = {
    "100m": ((768, 12, 2048, 8192), FineTune(sequence=32), "400MiB"),
    "100m-backward": ((768, 12, 2048, 8192), FineTune(sequence=32, in_backward=True), "400MiB"),
    "250m": ((1024, 19, 2752, 8192), FineTune(sequence=32), "500MiB"),
    "activations": ((256, 8, 704, 2048), FineTune(batch=16, sequence=256), "1GiB"),
    "activations-recompute": (
        (256, 8, 704, 2048), FineTune(batch=16, sequence=256, recompute=True), "352MiB"
    ),
    "100m-bf16-state": (
        (768, 12, 2048, 8192), FineTune(sequence=32, state_dtype="bf16"), "400MiB"
    ),
    "100m-lora": ((768, 12, 2048, 8192), FineTune(method="lora", sequence=128), "200MiB"),
}  # fmt: skip


def config_of(name: str) -> LlamaConfig:
    """The Llama of a case; heads of 64."""
    hidden, layers, intermediate, vocabulary = CASES[name][0]
    heads = hidden // 64
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip


def foretell(name: str, disk: Path) -> tuple[Answer, Machine, dict[str, Any]]:
    """The forecast with rates of this minute; they come along."""
    _, job, size = CASES[name]
    forecaster = Forecaster(config_of(name))
    site, budget = this_minute(forecaster, config_of(name), job, parse_size(size), disk)
    return forecaster.answer(job, site, budget), site.machine, as_dict(site.processor)


def this_minute(
    forecaster: Forecaster, config: LlamaConfig, job: FineTune, host_bytes: int, disk: Path
) -> tuple[Site, Budget]:
    """This machine, measured now, with so much host memory and a disk without end."""
    machine = probe_machine(disk)
    share, chunk_bytes = forecaster.share(job, host_bytes)
    processor = measure(sample_for(config, job, chunk_bytes, share), disk, machine)
    budget = Budget(host_bytes, None, 1 << 40)
    return Site("this", machine, processor, host_bytes, None, 1 << 40), budget


def child(name: str, disk: str, steps: int) -> None:
    """The job itself: seconds of each step, and what offload says of it."""
    _, job, size = CASES[name]
    seconds, run = run_job(config_of(name), job, size, disk, steps)
    print(json.dumps({"seconds": seconds, "stats": run.stats(), "phases": phases(run)}))


def run_job(
    config: LlamaConfig, job: FineTune, size: str | int, disk: str, steps: int
) -> tuple[list[float], Any]:
    """Seconds of each step, the first WARM_STEPS among them, and the run."""
    import offload

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = offload.init(lambda: build(config, job), host_memory=size, disk=disk)
    optimizer = optimizer_of(model)
    offload.wrap(
        model, optimizer, step_in_backward=job.in_backward, state_dtype=job.state_dtype
    )  # fmt: skip
    generator, seconds = torch.Generator().manual_seed(1), []
    for _ in range(WARM_STEPS + steps):
        ids = torch.randint(0, model.config.vocab_size, (job.batch, job.sequence),
                            generator=generator)  # fmt: skip
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds, offload.runtime(model)


def phases(run: Any) -> dict[str, list[float]]:
    """Of the recorded step, as replayed: by phase, seconds of work and of the engine's own."""
    from offload.steps import Kind

    trace, found = run.parts.steps.tracks[Kind.TRAIN].trace, {}
    for phase in Phase:
        moments = [m for m in trace.moments if m.phase is phase]
        found[phase.value] = [sum(m.compute_s for m in moments),
                              sum(m.handling_s for m in moments)]  # fmt: skip
    return found


def run_child(name: str, disk: Path, steps: int) -> dict[str, Any]:
    """A child with this case; its one line."""
    command = [sys.executable, __file__, "--child", name, "--disk", str(disk),
               "--steps", str(steps)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def compare(answer: Answer, line: dict[str, Any]) -> dict[str, Any]:
    """Foretold over measured."""
    stats, pace = line["stats"], answer.pace
    assert pace is not None
    step_s = statistics.median(line["seconds"][WARM_STEPS:])
    peak = stats["tiers"]["host"]["peak_bytes"]
    moved = {k: stats["step_bytes"][k] or 0 for k in ("read", "write")}
    return {
        "step_s": step_s, "peak_bytes": peak, "moved_bytes": moved,
        "disk_bytes": stats["tiers"]["disk"]["used_bytes"],
        "step_ratio": pace.step_s / step_s,
        "peak_ratio": answer.tiers["host"].peak_bytes / peak,
        "read_ratio": pace.read_bytes / moved["read"] if moved["read"] else None,
        "write_ratio": pace.write_bytes / moved["write"] if moved["write"] else None,
        "own_forecast": stats["forecast"], "phases": line["phases"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--steps", type=int, default=5, help="counted steps")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(args.child, str(args.disk), args.steps)
        return
    args.disk.mkdir(parents=True, exist_ok=True)
    for name in args.cases or CASES:
        with tempfile.TemporaryDirectory(dir=args.disk) as folder:
            answer, machine, processor = foretell(name, Path(folder))
            found = compare(answer, run_child(name, Path(folder), args.steps))
        assert answer.pace is not None
        print(f"{name:22} step {answer.pace.step_s:.3f} / {found['step_s']:.3f} s = "
              f"{found['step_ratio']:.3f}; peak {answer.tiers['host'].peak_bytes / MIB:.0f} / "
              f"{found['peak_bytes'] / MIB:.0f} MiB = {found['peak_ratio']:.4f}; read "
              f"{found['read_ratio']} write {found['write_ratio']}", flush=True)  # fmt: skip
        append("forecast", args.disk, case=name, job=asdict(CASES[name][1]),
               budget=CASES[name][2], foretold=asdict(answer.pace), measured=found,
               kinds={k: asdict(h) for k, h in answer.kinds.items()},
               rates=machine.to_dict(), processor=processor)  # fmt: skip


if __name__ == "__main__":
    main()
