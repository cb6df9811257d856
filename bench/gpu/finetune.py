"""A full fine-tune, bf16 with fp32 masters: ours, unwrapped, or a peer, under a cap of memory.

One sequence length, no padding, AdamW (fused, lr 1e-5), the same ids and starting weights. Ours:
weights, gradients and state on the host, computed with in bf16 frames. ``plain``: float32 weights
on the device under autocast. With ``--checkpointing`` all of them run layers again, except
"ours-auto", which chooses by itself what becomes of activations.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from gpu.common import (
    Step,
    arguments,
    cap_bytes,
    checkpointed,
    llama,
    measured,
    placed,
    plain_stats,
    shape_of,
    stepper,
    steps_of,
    timed,
    tokens_of,
    write_reports,
)
from gpu.runner import line

import offload
from offload.config import Tuning

PEERS = ("deepspeed", "fsdp2", "torchao")


def ours(args: argparse.Namespace, cap: int | None, held: list[Any], disk: str | None) -> Step:
    """Three lines of offload in a plain loop."""
    shape = shape_of(args)
    model = llama(shape)
    if args.checkpointing:
        checkpointed(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    where = placed(args, cap) | {"activations": "auto" if args.way == "ours-auto" else "keep"}
    if disk is not None:
        where |= {"disk": disk, "host_memory": 10 * shape.parameters + (64 << 20)}
    # Streamed: nothing lives on the device, so all crosses the bus and is updated on the host.
    tuning = Tuning(residents=args.way != "ours-streamed")
    offload.wrap(model, optimizer, compute_dtype=torch.bfloat16, tuning=tuning, **where)
    held.append(offload.runtime(model))
    return stepper(model, optimizer, tokens_of(args, shape.vocabulary))


def plain(args: argparse.Namespace) -> Step:
    """No offload: everything on the device."""
    shape = shape_of(args)
    place = "cpu" if args.emulated else "cuda"
    model = llama(shape).to(place)
    if args.checkpointing:
        checkpointed(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = tokens_of(args, shape.vocabulary).to(place)
    inner = stepper(model, optimizer, ids)

    def step() -> Any:
        with torch.autocast(place, dtype=torch.bfloat16):
            return inner()

    return step


def main() -> None:
    args = arguments(
        "plain", "ours", "ours-again", "ours-streamed", "ours-auto", "ours-disk", *PEERS
    )  # fmt: skip
    cap = cap_bytes(args)
    held: list[Any] = []
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        if args.way in PEERS:
            from gpu.peers import PEER_STEPS

            step = PEER_STEPS[args.way](args)
        elif args.way == "plain":
            step = plain(args)
        else:
            step = ours(args, cap, held, folder if args.way == "ours-disk" else None)
        shape = shape_of(args)
        line({"began": True})
        row = measured(args, shape, *timed(step, *steps_of(args)))
        row |= {"way": args.way, "cap_bytes": cap}
        if held:
            row["stats"] = plain_stats(held[0])
            line(row)
            again = "-checkpointing" if args.checkpointing else ""
            name = f"{args.shape}-{args.cap}-{args.tokens}{again}-{args.way}"
            line({"reports": write_reports(held[0], args, name)})
            held[0].close()
        else:
            line(row)


if __name__ == "__main__":
    main()
