"""A plain PyTorch loop, made to fit: the model and its AdamW state are larger than the budget.

python examples/plain_loop.py                 # a small Llama made here; seconds on a CPU
python examples/plain_loop.py --plain         # the same loop without offload: the same losses
python examples/plain_loop.py --model DIR --host-memory 8GiB --disk /scratch
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import offload


def small_model() -> LlamaForCausalLM:
    """A Llama of 1.4 M parameters: 5 MiB of weights, 21 MiB with gradients and AdamW's state."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_attention_heads=4, **sizes))


def main(argv: list[str] | None = None) -> tuple[list[float], dict]:
    """Train; returns the losses and what offload counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a directory that from_pretrained can load")
    parser.add_argument("--host-memory", default="12MiB")
    parser.add_argument("--disk", help="folder for what does not fit; default: a temporary one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--plain", action="store_true", help="without offload")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        budgets = {"host_memory": args.host_memory, "disk": args.disk or scratch}
        if args.plain or not args.model:
            load = LlamaForCausalLM.from_pretrained
            model = load(args.model) if args.model else small_model()
        else:  # never whole in memory; wrap() then keeps these budgets
            model, budgets = offload.from_pretrained(args.model, **budgets), {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        if not args.plain:
            model, optimizer = offload.wrap(model, optimizer, **budgets)
        tokens = torch.randint(0, 1000, (2, 64))  # one batch, learnt by heart
        losses = []
        for _ in range(args.steps):
            loss = model(input_ids=tokens, labels=tokens).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if args.plain:
            return losses, {}
        with offload.runtime(model) as run:
            return losses, run.stats()


if __name__ == "__main__":
    losses, stats = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; bytes per step: {stats.get('step_bytes')}")
