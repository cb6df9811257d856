"""Peers of the full fine-tune; each imports what it needs and fails where it is not."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from gpu.common import Step, checkpointed, llama, shape_of, stepper, tokens_of


def alone() -> None:
    """The environment of a world of one process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0",
        LOCAL_SIZE="1",
    )  # fmt: skip


def fresh(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Any:
    """The same model for all, layers run again where that is asked of all."""
    model = llama(shape_of(args), dtype)
    if args.checkpointing:
        checkpointed(model)
    return model


def deepspeed(args: argparse.Namespace) -> Step:
    """ZeRO-3 with parameters and optimizer in pinned host memory; its CPUAdam is compiled here."""
    alone()
    import deepspeed as ds

    where = {"device": "cpu", "pin_memory": True}
    config = {
        "train_micro_batch_size_per_gpu": args.batch, "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_param": where, "offload_optimizer": where,
                              "overlap_comm": True, "contiguous_gradients": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
    }  # fmt: skip
    ds.init_distributed("nccl")
    model = fresh(args, torch.bfloat16)
    engine, *_ = ds.initialize(model=model, config=config, model_parameters=model.parameters())
    ids = tokens_of(args, shape_of(args).vocabulary).cuda()

    def step() -> Any:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def fsdp2(args: argparse.Namespace) -> Step:
    """``fully_shard`` of every layer with CPUOffloadPolicy; AdamW on the host, fused."""
    alone()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cuda", (1,))
    told = {
        "mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=True),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
    }  # fmt: skip
    model = fresh(args)
    for layer in model.model.layers:
        fully_shard(layer, **told)
    fully_shard(model, **told)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.cuda())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return stepper(model, optimizer, tokens_of(args, shape_of(args).vocabulary).cuda())


def torchao(args: argparse.Namespace) -> Step:
    """Weights in bf16 on the device, optimizer state on the host (no float32 masters)."""
    from torchao.optim import CPUOffloadOptimizer

    model = fresh(args, torch.bfloat16).cuda()
    optimizer = CPUOffloadOptimizer(
        model.parameters(), torch.optim.AdamW, offload_gradients=True, lr=1e-5, fused=True
    )
    return stepper(model, optimizer, tokens_of(args, shape_of(args).vocabulary).cuda())


PEER_STEPS: dict[str, Callable[[argparse.Namespace], Step]] = {
    "deepspeed": deepspeed, "fsdp2": fsdp2, "torchao": torchao,
}  # fmt: skip
