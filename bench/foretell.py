"""Is the forecast of `offload plan --task generate` right? Plan and run by turns.

Each plan measures the machine anew. In the run that follows plain reads between its passes say
what the disk gives in those seconds (bench/pairs.py), and the plan is made once more with that
rate: what is then wrong is the plan's, the rest is the disk's, which is another a minute later.

Cases of a Llama of 364 M parameters that does not fit its budget: one prompt and 32 in float32
(the run: bench/throughput.py) and weights in int4 computed with in bfloat16 (bench/quantised.py
decode, where computing binds). Seconds of one-token passes, foretold over measured, and measured
over the run's own bound. Bar: 0.85 to 1.15. Appends a JSON line to bench/results/foretell.jsonl.
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
from record import append
from transformers import LlamaConfig

HERE = Path(__file__).parent
TOKENS = 16
# rows; budget; settings of the plan; layers, inner width, key-value heads and positions of
# the model: as the run has them, or what is measured for the plan is not taken by the run
CASES: dict[str, tuple[int, str, list[str], tuple[int, int, int, int]]] = {
    "one row": (1, "480MiB", [], (24, throughput.INNER, 16, 2048)),
    "32 rows": (32, "480MiB", [], (24, throughput.INNER, 16, 2048)),
    "int4": (1, "120MiB", ["--weight-dtype", "int4", "--dtype", "bfloat16"], (25, 2816, 8, 512)),
}


def planned(case: str, folder: Path, disk: Path, env: dict[str, str], *more: str) -> Any:
    """What the plan says, whose rates are measured now or, by ``--machine``, given."""
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
        "--max-new-tokens", str(TOKENS), "--no-advice", *settings, *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def again(case: str, folder: Path, disk: Path, env: dict[str, str], plan: Any, rate: float) -> Any:
    """The same plan, had the disk read at this rate when it was made."""
    machine = plan["rates"]["machine"]
    scale = rate / machine["read_bytes_per_s"]
    for name in ("read_bytes_per_s", "mixed_read_bytes_per_s"):
        machine[name] *= scale
    given = folder / "plan.json"
    given.write_text(json.dumps(plan))
    return planned(case, folder, disk, env, "--machine", str(given))


def measured(case: str, disk: Path, env: dict[str, str]) -> dict[str, float]:
    """``pass_s``: of one token in the run; over its own bound; the disk's rate meanwhile."""
    rows, budget, settings, _ = CASES[case]
    if settings:
        told = ["decode", "--ways", "int4", "--budget", budget, "--disk", str(disk)]
        command = [sys.executable, str(HERE / "quantised.py"), *told]
    else:
        command = [
            sys.executable, str(HERE / "throughput.py"), "--child", str(rows), "--budget", budget,
            "--disk", str(disk), "--prompt", str(TOKENS), "--new", str(TOKENS), "--paired",
        ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    said = done.stdout.splitlines()[-1]
    if settings:
        row: dict[str, Any] = ast.literal_eval(said)
        return {"pass_s": row["token_s"], "over_bound": row["over_own_bound"]}
    row = json.loads(said)
    each = {k: statistics.median(p[k] for p in row["pairs"]) for k in row["pairs"][0]}
    return each | {"over_bound": row["over_bound"]}


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
                plan = planned(case, folder, args.disk, env)
                row = measured(case, args.disk, env)
                row["foretold_s"] = plan["policy"]["times"]["pass_s"]
                if "bytes_per_s" in row:
                    plan = again(case, folder, args.disk, env, plan, row["bytes_per_s"])
                row["foretold_now_s"] = plan["policy"]["times"]["pass_s"]
                shutil.rmtree(kept)
                found[case].append(row)
                print(f"{turn} {case:8} foretold {row['foretold_s']:.3f} s, with the rate of the "
                      f"run {row['foretold_now_s']:.3f} s, measured {row['pass_s']:.3f} s; "
                      f"{row['over_bound']:.2f} x bound, {row.get('over_reads', 0.0):.2f} x plain "
                      "reads", flush=True)  # fmt: skip
    ratios = {
        f"{case}, {which}": [t[f"{which}_s"] / t["pass_s"] for t in turns]
        for case, turns in found.items() for which in ("foretold", "foretold_now")
    }  # fmt: skip
    for name, several in ratios.items():
        print(f"{name:22} / measured {statistics.median(several):.2f} "
              f"({min(several):.2f} to {max(several):.2f})")  # fmt: skip
    append("foretell", args.disk, turns=found, ratios=ratios)


if __name__ == "__main__":
    main()
