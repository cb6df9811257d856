"""DeepSpeed's contestants, run by the Python of .venv-peers/deepspeed.

ZeRO-3 on its CPU accelerator. ``cpu``: optimizer and parameters in host memory. ``nvme``: both on
disk (ZeRO-Infinity), with the documented defaults of its asynchronous I/O; ``nvme-tuned``: with
larger blocks and a second thread. Both hold as little as was found to work: small update groups,
nothing prefetched or kept, buffers for a few tensors. Its pipelined swapper stops with an
AssertionError in these; with one large group it runs, takes 4 GB or more and is no faster.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with socket.create_server(("127.0.0.1", 0)) as free:
    PORT = str(free.getsockname()[1])
os.environ.update(
    DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT,
    RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1",
)  # fmt: skip

import deepspeed
import torch
from child import SHAPES, arguments, build, serve

AIO = {
    "nvme": {"block_size": 1 << 20, "queue_depth": 8, "thread_count": 1},
    "nvme-tuned": {"block_size": 8 << 20, "queue_depth": 16, "thread_count": 2},
}


def settings(args: Any) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    shape = SHAPES[args.shape]
    where: dict[str, Any] = {"device": "cpu"}
    zero: dict[str, Any] = {"stage": 3}
    if args.kind != "cpu":
        where = {"device": "nvme", "nvme_path": str(args.disk), "pin_memory": False}
        largest = max(shape.embedding, shape.hidden * shape.intermediate)
        zero |= {
            "sub_group_size": 10_000_000, "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        }  # fmt: skip
        zero["offload_param"] = where | {"buffer_count": 8, "buffer_size": largest + 4096}
        zero["offload_optimizer"] = where | {"buffer_count": 4}
    else:
        zero |= {"offload_param": where, "offload_optimizer": where}
    return {
        "train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9, "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 1e-2}},
        **({"aio": AIO[args.kind] | {"single_submit": False, "overlap_events": True}}
           if args.kind in AIO else {}),
    }  # fmt: skip


def main() -> None:
    args = arguments(("cpu", "nvme", "nvme-tuned"))

    def ready() -> Any:
        deepspeed.init_distributed("gloo")
        config = settings(args)
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = build(SHAPES[args.shape])
        engine, *_ = deepspeed.initialize(
            model=model, config=config, model_parameters=model.parameters()
        )

        def step(ids: torch.Tensor) -> torch.Tensor:
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            return loss

        return step

    serve(ready, args)


if __name__ == "__main__":
    main()
