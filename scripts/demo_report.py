"""Check and show what the demo did: the loss fell, most bytes were on disk, the model works."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

STATE_BYTES_PER_PARAMETER = 16  # fp32: weight, gradient, two moments of Adam
LEAST_DISK_SHARE = 0.7
PROMPT = "import os\n\ndef "


def check_run(run: Path, state_bytes: int) -> None:
    """Exit with a message unless the loss fell and the state was mostly out of memory."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = statistics.fmean(row["loss"] for row in rows[:5])
    last = statistics.fmean(row["loss"] for row in rows[-5:])
    most_host = max(row["tier_bytes"]["host"] for row in rows)
    disk_bytes = min(row["tier_bytes"]["disk"] for row in rows)
    # What the host holds at its fullest may all be state; the rest is then on disk alone.
    share = min(disk_bytes, state_bytes - most_host) / state_bytes
    step_s = statistics.median(row["step_s"] for row in rows)
    bounds = [row["bound_s"] for row in rows if row.get("bound_s")]
    print(f"loss {first:.3f} -> {last:.3f} (mean of the first and last five of {len(rows)} steps)")
    print(f"state {state_bytes / 2**20:.0f} MiB, of which {share:.0%} never fits in memory")
    if bounds:
        print(f"step {step_s:.2f} s, {step_s / statistics.median(bounds):.2f} x its bound")
    if last >= first - 0.5:
        sys.exit("error: the loss did not fall")
    if share < LEAST_DISK_SHARE:
        sys.exit(f"error: only {share:.0%} of the state was out of memory")


def main() -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    run = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    check_run(run, sum(p.numel() for p in model.parameters()) * STATE_BYTES_PER_PARAMETER)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    print(f"plain transformers loads {run / 'model'} and writes:")
    print(tokenizer.decode(made[0]))


if __name__ == "__main__":
    main()
