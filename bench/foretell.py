"""Is the forecast of `offload plan --task generate` right? Plan and run by turns.

Each plan measures the machine anew, and the run that follows has the disk's rates that it measured:
its bound is of the same minute.

Cases of a Llama of 364 M parameters that does not fit its budget: one prompt and 32 in float32
(the run: bench/throughput.py, in its memory cgroup), and weights in int4 computed with in bfloat16
(bench/quantised.py decode). Seconds of one-token passes, foretold over measured, and measured over
the run's own bound. Bar: 0.85 to 1.15. Appends a JSON line to bench/results/foretell.jsonl.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import throughput
from memory import run_in_cgroup
from record import append
from transformers import LlamaConfig

from offload.tiers.spec import parse_size

HERE = Path(__file__).parent
TOKENS = 16
# rows; budget; settings of the plan; layers, inner width, key-value heads and positions of
# the model: as the run has them, or what is measured for the plan is not taken by the run
CASES: dict[str, tuple[int, str, list[str], tuple[int, int, int, int]]] = {
    "one row": (1, "480MiB", [], (24, throughput.INNER, 16, 2048)),
    "32 rows": (32, "480MiB", [], (24, throughput.INNER, 16, 2048)),
    "int4": (1, "120MiB", ["--weight-dtype", "int4", "--dtype", "bfloat16"], (25, 2816, 8, 512)),
}


def foretold_s(case: str, folder: Path, disk: Path, env: dict[str, str]) -> float:
    """Seconds of a one-token pass by a plan whose rates are measured now."""
    rows, budget, settings, (layers, inner, heads, positions) = CASES[case]
    LlamaConfig(
        vocab_size=throughput.VOCABULARY, hidden_size=throughput.HIDDEN, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=heads,
        max_position_embeddings=positions, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    command = [
        str(Path(sys.executable).parent / "offload"), "plan", "--task", "generate", "--json",
        "--model", str(folder), "--disk", str(disk), "--host-memory", budget,
        "--prompt-count", str(rows), "--prompt-tokens", str(TOKENS),
        "--max-new-tokens", str(TOKENS), "--no-advice", *settings,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    policy = json.loads(done.stdout.splitlines()[-1])["policy"]
    return float(policy["times"]["pass_s"])


def measured(case: str, disk: Path, env: dict[str, str]) -> tuple[float, float]:
    """Seconds of a one-token pass of the run, and over its bound."""
    rows, budget, settings, _ = CASES[case]
    if settings:
        told = ["decode", "--ways", "int4", "--budget", budget, "--disk", str(disk)]
        command = [sys.executable, str(HERE / "quantised.py"), *told]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        row: dict[str, Any] = ast.literal_eval(done.stdout.splitlines()[-1])
        return row["token_s"], row["over_own_bound"]
    command = [
        sys.executable, str(HERE / "throughput.py"), "--child", str(rows), "--budget", budget,
        "--disk", str(disk), "--prompt", str(TOKENS), "--new", str(TOKENS),
    ]  # fmt: skip
    variables = [f"{k}={v}" for k, v in env.items() if os.environ.get(k) != v]
    row = run_in_cgroup(["env", *variables, *command], parse_size("800MiB"))["lines"][-1]
    return row["step_s"], row["over_bound"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=Path("bench-spill"))
    args = parser.parse_args()
    args.disk.mkdir(parents=True, exist_ok=True)
    names = args.cases or list(CASES)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=args.disk) as name:
        folder = Path(name)
        for turn in range(args.turns):
            for case in names:
                kept = folder / "measured anew"
                env = {**os.environ, "XDG_CACHE_HOME": str(kept)}
                said_s = foretold_s(case, folder, args.disk, env)
                took_s, over_bound = measured(case, args.disk, env)
                shutil.rmtree(kept)
                found[case].append(
                    {"foretold_s": said_s, "measured_s": took_s, "over_bound": over_bound}
                )
                print(f"{turn} {case:8} foretold {said_s:.3f} s, measured {took_s:.3f} s: "
                      f"{said_s / took_s:.2f}; {over_bound:.2f} x bound", flush=True)  # fmt: skip
    ratios = {k: [t["foretold_s"] / t["measured_s"] for t in turns] for k, turns in found.items()}
    for case, several in ratios.items():
        print(f"{case:8} foretold / measured {statistics.median(several):.2f} "
              f"({min(several):.2f} to {max(several):.2f})")  # fmt: skip
    append("foretell", args.disk, turns=found, ratios=ratios)


if __name__ == "__main__":
    main()
