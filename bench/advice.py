"""Is the advice right? Every change that `offload plan` and the report name is made and measured.

One job is foretold with rates of this minute; then it runs, and each variant of it, as a process of
its own, the job itself again between every two, so that what the machine does meanwhile is in both.
Recorded: tokens a second of each variant over the job's, as planned, as the report of the job's run
says it, and as measured. A pair is in wrong order where the slower one of two (by more than
TIE) was said to be the faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forecast import WARM_STEPS, run_job, this_minute
from record import append
from transformers import LlamaConfig

from offload.advise import outcome, site_of_variant, variants
from offload.blueprint import FineTune
from offload.forecast import Forecaster
from offload.machines import Site
from offload.prefetch.advice import Change, Cost, rank
from offload.tiers.spec import Budget, format_size, parse_size

TIE = 0.05

JOBS: dict[str, tuple[tuple[int, int, int, int], FineTune, str]] = {
    "25m": ((384, 10, 1088, 8192), FineTune(batch=2, sequence=64), "120MiB"),
    "25m-long": ((384, 10, 1088, 8192), FineTune(batch=4, sequence=256), "200MiB"),
}
SAID = {  # by the report, and the variant of the plan that it means
    "step_in_backward": (r"step_in_backward=True.*up to ([\d.e-]+) s", "--step-in-backward"),
    "memory": (r"^([\d.]+ \w+) more host memory would save ([\d.e-]+) s", "--host-memory"),
    "twice": (r"twice the tokens a step.*take ([\d.]+) x", "--batch-size"),
    "state": (r"state_dtype=\"bf16\".*: ([\d.e-]+) s a step less", "--state-dtype bf16"),
}  # fmt: skip


def config_of(name: str) -> LlamaConfig:
    """The Llama of a job; heads of 64."""
    hidden, layers, intermediate, vocabulary = JOBS[name][0]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )  # fmt: skip


def child(name: str, asked: dict[str, Any], disk: str, steps: int) -> None:
    """One variant: its median step, and what its report advises."""
    from offload.report import report_data

    job, host_bytes = FineTune(**asked["job"]), asked["host_bytes"]
    seconds, run = run_job(config_of(name), job, host_bytes, disk, steps)
    advice = report_data(run)["verdict"]["advice"] if asked["advice"] else []
    print(json.dumps({"step_s": statistics.median(seconds[WARM_STEPS:]), "advice": advice,
                      "own_s": run.stats()["forecast"]["step_s"]}))  # fmt: skip


def measured(
    name: str, job: FineTune, host_bytes: int, disk: Path, steps: int, *, advice: bool = False
) -> dict[str, Any]:
    """A child of its own; its one line."""
    asked = json.dumps({"job": asdict(job), "host_bytes": host_bytes, "advice": advice})
    folder = tempfile.mkdtemp(dir=disk)
    command = [sys.executable, __file__, name, "--child", asked, "--disk", folder,
               "--steps", str(steps)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder)
    if done.returncode:
        raise SystemExit(done.stderr.strip().splitlines()[-1])
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


def by_the_report(advice: Iterable[str], step_s: float) -> dict[str, tuple[float, str]]:
    """Tokens a second over the job's, by flag, and how much memory was meant."""
    found = {}
    for text, (pattern, flag) in itertools.product(advice, SAID.values()):
        hit = re.search(pattern, text)
        if hit is None:
            continue
        if flag == "--batch-size":
            found[flag] = 2 / float(hit[1]), ""
        else:
            found[flag] = step_s / (step_s - float(hit[hit.lastindex or 1])), hit[1]
    return found


def wrong_pairs(rows: list[dict[str, Any]], key: str) -> list[tuple[str, str]]:
    """Pairs whose order was said the other way round."""
    known = [row for row in rows if row[key] is not None]
    return [
        (a["what"], b["what"]) for a, b in itertools.permutations(known, 2)
        if a[key] > b[key] and a["measured"] < (1 - TIE) * b["measured"]
    ]  # fmt: skip


def check(name: str, disk: Path, steps: int, only: str) -> None:
    """One job and its variants; a line is recorded."""
    _, job, size = JOBS[name]
    host_bytes, config = parse_size(size), config_of(name)
    forecaster = Forecaster(config)
    site, budget = this_minute(forecaster, config, job, host_bytes, disk)
    now = forecaster.answer(job, site, budget)

    def site_for(other: FineTune) -> Site:
        return this_minute(forecaster, config, other, host_bytes, disk)[0]

    tried = [v for v in variants(job, budget, now) if re.search(only, v[0])]
    base = [measured(name, job, host_bytes, disk, steps, advice=True)]
    said = by_the_report(base[0]["advice"], base[0]["own_s"])
    if "--host-memory" in said and re.search(only, "--host-memory"):
        room = Budget(host_bytes + parse_size(said["--host-memory"][1]), None, budget.disk_bytes)
        what = f"{format_size(room.host_bytes)} as the report says (--host-memory)"
        tried.append((what, Cost.HARDWARE, job, room))
    rows = []
    for what, cost, other, room in tried:
        there = site_of_variant(site, job, other, site_for)
        then = outcome(forecaster.answer(other, there, room), other)
        change = Change(what, cost, then)
        line = measured(name, other, room.host_bytes, disk, steps)
        base.append(measured(name, job, host_bytes, disk, steps))
        around_s = (base[-2]["step_s"] + base[-1]["step_s"]) / 2
        flag = re.search(r"\((.+)\)", what)
        by_report = said.get(flag[1] if flag else "")
        if other.batch > job.batch:
            by_report = said.get("--batch-size")
        if by_report and "--host-memory" in what and "as the report says" not in what:
            by_report = None  # it speaks of another amount
        rows.append({
            "what": what, "cost": cost.name,
            "named": bool(rank(outcome(now, job), [change])),
            "planned": change.gain(outcome(now, job)),
            "by_report": by_report[0] if by_report else None,
            "measured": other.tokens / line["step_s"] / (job.tokens / around_s),
            "step_s": line["step_s"], "planned_step_s": other.tokens / then.tokens_per_s,
            "job_s": around_s,
        })  # fmt: skip
        row = rows[-1]
        print(f"{what:62} planned {row['planned']:.2f} report {row['by_report'] or 0:.2f} "
              f"measured {row['measured']:.2f}  ({row['step_s']:.3f} s, job {around_s:.3f} s)",
              flush=True)  # fmt: skip
    wrong = {key: wrong_pairs(rows, key) for key in ("planned", "by_report")}
    print(wrong)
    assert now.pace is not None
    append("advice", disk, job=asdict(job), name=name, budget=size, rows=rows, wrong=wrong,
           planned_step_s=now.pace.step_s, job_s=[line["step_s"] for line in base],
           report_advice=base[0]["advice"], rates=site.machine.to_dict())  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    parser.add_argument("--steps", type=int, default=8, help="counted steps")
    parser.add_argument("--only", default="", help="variants whose words hold this expression")
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        child(args.job, json.loads(args.child), str(args.disk), args.steps)
        return
    args.disk.mkdir(parents=True, exist_ok=True)
    check(args.job, args.disk, args.steps, args.only)


if __name__ == "__main__":
    main()
