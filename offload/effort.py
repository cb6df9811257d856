"""What a step costs on this machine beyond the roofline: measured on a small run of the same kind.

A small Llama, as wide as the model if that is not wide, is fine-tuned for a few steps the way the
job asks for, managed, with the same share of its state in memory and chunks of the same size. What
its recorded moments took over what the roofline says for them is the factor of each phase: page
faults, allocations, calls, and what transfers take from the processor. What the engine itself took
is counted for each byte that moments need; what whole steps took beyond the replay of their traces
(computing takes from the disk) is one more factor. Nothing of this is assumed for other machines.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from offload.blueprint import FineTune, build, draft, optimizer_of, outline_of
from offload.config import Tuning
from offload.dryrun import dry_run
from offload.machines import Effort, Processor
from offload.prefetch.planner import plan
from offload.prefetch.trace import Phase, Trace
from offload.steps import Kind
from offload.synthesis import Setting, synthesise
from offload.tiers.probe import keep, remembered_at
from offload.tiers.spec import GIB, MIB, Machine

SAMPLE_PARAMETERS = 40_000_000  # with fewer, what a step costs once showed: 10% too slow
WIDEST = 1024
MOST_TOKENS = 4096  # of a step of the sample: beyond, everything grows in proportion
ROUNDS = 4  # of recording anew: what one step takes varies by a third
STEPS = 4  # of a round: the first is recorded, the third and the fourth are timed
_SIDE = 1024  # of the product that is timed


@dataclass(frozen=True, slots=True)
class Sample:
    """A small run like the one that is asked about. ``share``: of its state that memory holds."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    chunk_bytes: int
    share: float
    job: FineTune

    def config(self) -> Any:
        """Its model."""
        from transformers import LlamaConfig

        heads = max(self.hidden // 64, 1)
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden,
            intermediate_size=self.intermediate, num_hidden_layers=self.layers,
            num_attention_heads=heads, num_key_value_heads=heads, use_cache=False,
            max_position_embeddings=max(self.job.sequence, 2048),
        )  # fmt: skip


def sample_for(config: Any, job: FineTune, chunk_bytes: int, share: float) -> Sample:
    """The small run for a model's configuration. ``share`` is rounded, so that it can be kept."""
    text = config.get_text_config(decoder=True)
    width = int(text.hidden_size)
    hidden = max(min(width, WIDEST) // 64 * 64, 64)
    names = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
    inner = next(
        (n for name in names if isinstance(n := getattr(text, name, None), int)), 4 * width
    )
    intermediate = max(round(inner / width * hidden / 64) * 64, 64)
    layer = 4 * hidden**2 + 3 * hidden * intermediate
    layers = min(max(SAMPLE_PARAMETERS // layer, 2), int(text.num_hidden_layers), 12)
    vocabulary = min(int(text.vocab_size), max(SAMPLE_PARAMETERS // 8 // hidden, 512))
    sequence = min(job.sequence, MOST_TOKENS)
    job = replace(job, sequence=sequence, batch=max(min(job.batch, MOST_TOKENS // sequence), 1),
                  compute_dtype=None)  # fmt: skip
    weights = (layers * layer + 2 * vocabulary * hidden) * (2 if job.dtype == "bfloat16" else 4)
    chunk = max(min(chunk_bytes, weights // 8) // 65536 * 65536, 65536)
    return Sample(hidden, intermediate, layers, vocabulary, chunk,
                  min(round(share * 20) / 20, 1.0), job)  # fmt: skip


def cached_processor(sample: Sample, folder: Path, machine: Machine) -> Processor:
    """The last measurement of such a run on this disk, or a new one, which is then kept."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = [asdict(sample), torch.get_num_threads(), torch.__version__, machine.to_dict()]
    name = hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16]
    kept = remembered_at(folder, f"effort-{name}")
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return processor_of(json.loads(kept.read_text()))
    found = measure(sample, folder, machine)
    keep(kept, as_dict(found))  # where that cannot be, the next one measures again
    return found


def measure(sample: Sample, folder: Path, machine: Machine) -> Processor:
    """Run the sample in a folder of its own; some seconds. Raises what ``offload.wrap`` raises."""
    rate = 2.0 * machine.copy_bytes_per_s
    plain = Processor(_product_rate(sample.job.dtype), rate, rate)
    made = draft(sample.config(), sample.job)
    step = dry_run(made)
    where = outline_of(made.model, sample.job, GIB, sample.chunk_bytes)
    other = step.saved_bytes + max(p.nbytes for p in made.model.parameters())
    host = int(sample.share * where.total_bytes) if sample.share < 1 else where.total_bytes
    least = (2 * where.copies + 2) * sample.chunk_bytes
    host = max(host, least) + other + where.fixed_bytes + 32 * MIB * (sample.share >= 1)
    taken = _run(sample, host, folder, machine)
    unit = synthesise(step, where, plain, Setting(sample.job.in_backward))
    return replace(plain, effort=compare(unit, taken))


@dataclass(frozen=True, slots=True)
class Taken:
    """A recorded step, and how long it took over what replaying its trace says."""

    trace: Trace
    beyond: float


def compare(unit: Trace, taken: Sequence[Taken]) -> Effort:
    """Factors by phase of what moments took over what the roofline says, and handling a byte.

    The median of the steps taken.
    """
    expected_s, _, needed = _sums(unit)
    work, handling = zip(*(_sums(t.trace)[:2] for t in taken), strict=True)

    def middle(found: Sequence[Mapping[Phase, float]], phase: Phase) -> float:
        return statistics.median(f.get(phase, 0.0) for f in found)

    return Effort(
        {p: middle(work, p) / s for p, s in expected_s.items() if s},
        {p: middle(handling, p) / size for p, size in needed.items() if size},
        statistics.median(t.beyond for t in taken),
    )


def as_dict(processor: Processor) -> dict[str, Any]:
    """Plain numbers, for JSON."""
    effort = processor.effort
    return asdict(replace(processor, effort=Effort())) | {
        "effort": {
            "factor": {p.value: f for p, f in effort.factor.items()},
            "handling_s_per_byte": {p.value: f for p, f in effort.handling_s_per_byte.items()},
            "beyond": effort.beyond,
        }
    }


def processor_of(found: Mapping[str, Any]) -> Processor:
    """From ``as_dict``. Raises TypeError, KeyError or ValueError for anything else."""
    effort = found["effort"]
    factor, handling = (
        {Phase(p): float(f) for p, f in effort[name].items()}
        for name in ("factor", "handling_s_per_byte")
    )
    return Processor(
        float(found["flops_per_s"]), float(found["bytes_per_s"]),
        float(found["update_bytes_per_s"]), Effort(factor, handling, float(effort["beyond"])),
    )  # fmt: skip


def _sums(trace: Trace) -> tuple[dict[Phase, float], dict[Phase, float], dict[Phase, float]]:
    """By phase: seconds of work, the engine's own seconds, bytes that moments need."""
    work, handling, needed = (defaultdict[Phase, float](float) for _ in range(3))
    for m in trace.moments:
        work[m.phase] += m.compute_s
        handling[m.phase] += m.handling_s
        needed[m.phase] += sum(trace.chunk_bytes[n.chunk] for n in m.needs)
    return work, handling, needed


def _run(sample: Sample, host_bytes: int, folder: Path, machine: Machine) -> list[Taken]:
    """Recorded steps of the sample, each with the times of two replayed ones."""
    import offload

    with tempfile.TemporaryDirectory(dir=folder) as place, torch.random.fork_rng(devices=[]):
        model = build(sample.config(), sample.job)
        optimizer = optimizer_of(model)
        tuning = Tuning(sample.chunk_bytes, machine=machine, keep_hooks=True)
        offload.wrap(
            model, optimizer, host_memory=host_bytes, disk=place, tuning=tuning,
            step_in_backward=sample.job.in_backward, state_dtype=sample.job.state_dtype,
        )  # fmt: skip
        with offload.runtime(model) as run:
            ids = torch.randint(0, sample.vocabulary, (sample.job.batch, sample.job.sequence))
            found: list[Taken] = []
            for _ in range(ROUNDS):
                for _ in range(STEPS if found else STEPS + 1):  # the very first shows what arrives
                    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                track = run.parts.steps.tracks[Kind.TRAIN]
                assert track.trace is not None
                room = run.parts.engine.ledger.capacity_bytes
                foreseen_s = plan(track.trace, machine, room).forecast.step_s
                step_s = statistics.mean(track.replayed_s[-2:])
                found.append(Taken(track.trace, step_s / foreseen_s))
                run.parts.steps.forget(Kind.TRAIN)
            return found


def _product_rate(dtype: str) -> float:
    """Floating-point operations a second of a square product on this machine's torch threads."""
    a = torch.ones(_SIDE, _SIDE, dtype=getattr(torch, dtype))
    taken = []
    for _ in range(4):
        begin_s = time.perf_counter()
        torch.mm(a, a)
        taken.append(time.perf_counter() - begin_s)
    return float(2 * _SIDE**3 / statistics.median(taken[1:]))
