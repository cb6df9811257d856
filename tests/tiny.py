"""A very small Llama on disk, words to train it with, and the configuration of a run of it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from offload.runconfig import RunConfig, build_config
from offload.tinymodel import train_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and runs away from the old grey cat\n"


def write_tiny_model(folder: Path) -> Path:
    """A Hugging Face directory of a Llama with dropout and 64 positions."""
    tokenizer = train_tokenizer([])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": 0.2}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = LlamaConfig(max_position_embeddings=64, **sizes, **heads, **tokens)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_run(model: Path, folder: Path) -> RunConfig:
    """Six steps of two micro-batches in ``folder``."""
    text = folder / "words.txt"
    text.write_text(WORDS * 40)
    return build_config(
        {
            "model": str(model),
            "output": str(folder / "run"),
            "data.path": str(text),
            "data.seq_len": 32,
            "data.batch_size": 2,
            "data.accumulate": 2,
            "data.eval_fraction": 0.1,
            "schedule.steps": 6,
            "schedule.warmup": 2,
            "schedule.eval_every": 3,
            "schedule.save_every": 2,
            "optimizer.lr": 1e-2,
        }
    )
