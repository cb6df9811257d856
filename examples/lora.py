"""LoRA (peft) over a frozen base that is larger than the budget: the base is read, never written.

python examples/lora.py                # a small Llama made here; --plain: without offload
python examples/lora.py --model DIR --host-memory 8GiB --disk /scratch
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import offload


def small_model() -> LlamaForCausalLM:
    """A Llama of 5.8 M parameters: 22 MiB of weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_attention_heads=4, **sizes))


def main(argv: list[str] | None = None) -> tuple[list[float], dict]:
    """Train; returns the losses and what offload counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a directory that from_pretrained can load")
    parser.add_argument("--host-memory", default="12MiB")
    parser.add_argument("--disk", help="folder for what does not fit; default: a temporary one")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--plain", action="store_true", help="without offload")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        budgets = {"host_memory": args.host_memory, "disk": args.disk or scratch}
        if args.plain or not args.model:
            base = LlamaForCausalLM.from_pretrained(args.model) if args.model else small_model()
        else:  # never whole in memory; wrap() then keeps these budgets
            base, budgets = offload.from_pretrained(args.model, **budgets), {}
        model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
        trained = (p for p in model.parameters() if p.requires_grad)
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=True)
        if not args.plain:
            offload.wrap(model, optimizer, **budgets)
        tokens, losses = torch.randint(0, 1000, (1, 32)), []  # one batch, learnt by heart
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
