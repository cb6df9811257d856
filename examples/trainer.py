"""transformers.Trainer with a model and an optimizer that offload manages. Needs accelerate.

python examples/trainer.py             # a small Llama made here; --plain: without offload
python examples/trainer.py --model DIR --host-memory 8GiB --disk /scratch
"""

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import offload


def small_model() -> LlamaForCausalLM:
    """A Llama of 1.4 M parameters: 5 MiB of weights, 21 MiB with gradients and AdamW's state."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=2048, num_attention_heads=4, **sizes))


def main(argv: list[str] | None = None) -> tuple[list[float], dict]:
    """Train; returns the logged losses and what offload counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a directory that from_pretrained can load")
    parser.add_argument("--host-memory", default="12MiB")
    parser.add_argument("--disk", help="folder for what does not fit; default: a temporary one")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="without offload")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        budgets = {"host_memory": args.host_memory, "disk": args.disk or scratch}
        if args.plain or not args.model:
            model = LlamaForCausalLM.from_pretrained(args.model) if args.model else small_model()
        else:  # never whole in memory; wrap() then keeps these budgets
            model, budgets = offload.from_pretrained(args.model, **budgets), {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        if not args.plain:
            offload.wrap(model, optimizer, **budgets)
        rows = torch.randint(0, 1000, (4, 32))
        data = [{"input_ids": row, "labels": row} for row in rows] * 2 * args.steps
        settings = TrainingArguments(
            output_dir=f"{scratch}/trainer", max_steps=args.steps, logging_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=1.0,
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None))
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        if args.plain:
            return losses, {}
        with offload.runtime(model) as run:
            return losses, run.stats()


if __name__ == "__main__":
    losses, stats = main()
    print(f"loss {losses[0]} -> {losses[-1]}; bytes per step: {stats.get('step_bytes')}")
