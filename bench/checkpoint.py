"""A local Llama checkpoint with random weights, written layer by layer: never whole in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig


def config(hidden: int, layers: int, intermediate: int, head: int, dtype: str) -> LlamaConfig:
    """A Llama with a vocabulary of 32000 and untied embeddings."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=intermediate, dtype=dtype,
        num_hidden_layers=layers, num_attention_heads=hidden // head,
        num_key_value_heads=hidden // head, architectures=["LlamaForCausalLM"],
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


SHAPES = {
    "tiny": lambda: config(128, 3, 256, 64, "float32"),
    "364m": lambda: config(1024, 24, 2688, 64, "float32"),
    "3b": lambda: config(3072, 26, 8192, 128, "bfloat16"),
}


def shards(of: LlamaConfig) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file: one per layer, and one per embedding."""
    generator = torch.Generator().manual_seed(0)

    def weight(rows: int, columns: int) -> Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=of.dtype)
        return drawn.mul_(columns**-0.5)  # keeps activations of one size through the layers

    size, inner = of.hidden_size, of.intermediate_size
    ones = torch.ones(size, dtype=of.dtype)
    yield {"model.embed_tokens.weight": weight(of.vocab_size, size)}
    for i in range(of.num_hidden_layers):
        tensors = {f"self_attn.{n}_proj.weight": weight(size, size) for n in "qkvo"}
        tensors |= {f"mlp.{n}_proj.weight": weight(inner, size) for n in ("gate", "up")}
        tensors |= {"mlp.down_proj.weight": weight(size, inner)}
        norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
        tensors |= {n: ones.clone() for n in norms}
        yield {f"model.layers.{i}.{n}": t for n, t in tensors.items()}
    yield {"model.norm.weight": ones, "lm_head.weight": weight(of.vocab_size, size)}


def make(folder: Path, shape: str) -> Path:
    """The checkpoint of this shape under a folder, written where it is not there yet."""
    target = folder / f"llama-{shape}"
    index = target / "model.safetensors.index.json"
    if index.exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    of = SHAPES[shape]()
    of.save_pretrained(target)
    where, total_bytes = {}, 0
    for i, tensors in enumerate(shards(of)):
        name = f"model-{i:05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        total_bytes += sum(t.nbytes for t in tensors.values())
    index.write_text(json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": where}))
    return target


def weight_bytes(checkpoint: Path) -> int:
    """Bytes of all weights."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    return int(index["metadata"]["total_size"])


def chill(folder: Path) -> None:
    """Have the system forget the cached pages of a folder's files: cold, as after a boot."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
