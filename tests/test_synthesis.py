"""A step that never ran, against one that did: the same moments, the same bytes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig, T5Config

import offload
from offload.blueprint import FineTune, build, draft, optimizer_of, outline_of
from offload.config import Tuning
from offload.dryrun import dry_run
from offload.prefetch.trace import Phase, Trace
from offload.run import Runtime
from offload.steps import Kind
from offload.synthesis import Setting, synthesise
from offload.tiers.spec import KIB, MIB
from tests.conftest import MACHINE

CHUNK_BYTES = 16 * KIB


class Unhurried:
    """Everything takes the same."""

    def work_s(self, phase: Phase, work: Iterable[tuple[float, float]]) -> float:
        return 1e-3

    def update_s(self, phase: Phase, size_bytes: int) -> float:
        return 1e-3

    def handling_s(self, phase: Phase, size_bytes: int) -> float:
        return 0.0


def llama(**changes: Any) -> Any:
    return LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, **changes,
    )  # fmt: skip


def gpt2() -> Any:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, **off)


def t5() -> Any:
    return T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                    dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip


def mixtral() -> Any:
    return MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip


CASES = {
    "llama": (llama, FineTune(batch=2, sequence=16)),
    "tied": (lambda: llama(tie_word_embeddings=True), FineTune(batch=2, sequence=16)),
    "recompute": (llama, FineTune(batch=2, sequence=16, recompute=True)),
    "bf16": (llama, FineTune(batch=2, sequence=16, dtype="bfloat16")),
    "narrow": (llama, FineTune(batch=2, sequence=16, state_dtype="bf16")),
    "in backward": (llama, FineTune(batch=2, sequence=16, in_backward=True)),
    "tied in backward": (
        lambda: llama(tie_word_embeddings=True),
        FineTune(batch=1, sequence=16, in_backward=True),
    ),
    "lora": (llama, FineTune(method="lora", rank=4, batch=2, sequence=16)),
    "lora int4": (
        llama, FineTune(method="lora", rank=4, batch=2, sequence=16, weight_dtype="int4")
    ),
    "gpt2": (gpt2, FineTune(batch=2, sequence=16)),
    "t5": (t5, FineTune(batch=2, sequence=16)),
    "experts": (mixtral, FineTune(batch=2, sequence=16)),
}  # fmt: skip


def real_run(config: Any, job: FineTune, folder: Path, host_bytes: int = 16 * MIB) -> Runtime:
    """Five steps of the very job, managed."""
    torch.manual_seed(0)
    model = build(config, job)
    tuning = Tuning(chunk_bytes=CHUNK_BYTES, machine=MACHINE, keep_hooks=True)
    optimizer = optimizer_of(model)
    offload.wrap(
        model, optimizer, host_memory=host_bytes, disk=folder, tuning=tuning,
        step_in_backward=job.in_backward, state_dtype=job.state_dtype,
    )  # fmt: skip
    ids = torch.randint(0, 128, (job.batch, job.sequence))
    for _ in range(5):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return offload.runtime(model)


def keys(trace: Trace) -> list[Any]:
    """Moments as they can be compared: phase, chunks and how each is used."""
    return [(m.phase.value, tuple((n.chunk, n.access.value) for n in m.needs))
            for m in trace.moments]  # fmt: skip


def placed(run: Runtime) -> dict[str, tuple[int, int]]:
    """(bytes of elements, bytes that regions take) of each kind, as the engine has them."""
    found = {"weights": (0, 0), "gradients": (0, 0), "optimizer": (0, 0)}
    for family in run.parts.binding.families:
        regions = [("weights", family.weights), ("gradients", family.grads)]
        regions += [("optimizer", region) for region in family.states.values()]
        for name, region in regions:
            if region is not None:
                sizes = (run.parts.engine.space.chunks[c].size_bytes for c in region.chunk_ids)
                a, b = found[name]
                found[name] = a + sum(region.layout.numels) * region.itemsize, b + sum(sizes)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_trace_is_that_of_a_real_step(name: str, tmp_path: Path) -> None:
    make, job = CASES[name]
    run = real_run(make(), job, tmp_path)
    recorded = run.parts.steps.tracks[Kind.TRAIN].trace
    assert recorded is not None
    made = draft(make(), job)
    where = outline_of(made.model, job, 16 * MIB, CHUNK_BYTES)
    trace = synthesise(dry_run(made), where, Unhurried(), Setting(job.in_backward))
    assert trace.chunk_bytes == recorded.chunk_bytes
    assert keys(trace) == keys(recorded)
    assert set(trace.dead_after) == set(recorded.dead_after)
    assert max(m.other_bytes for m in trace.moments) == pytest.approx(
        max(m.other_bytes for m in recorded.moments), abs=64
    )
    ledger = run.parts.engine.ledger
    assert ledger.fixed_bytes == where.fixed_bytes
    assert where.by_kind() == placed(run)
    disk = run.parts.engine.space.disk
    assert disk is not None
    assert disk.used_bytes == where.total_bytes
    run.close()
