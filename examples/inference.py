"""Generate with a model that is never whole in memory: model.generate, then many prompts at once.

python examples/inference.py                  # a small Llama made here; seconds on a CPU
python examples/inference.py --plain          # plain transformers: the same tokens
python examples/inference.py --model DIR --host-memory 8GiB --disk /scratch
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import offload


def write_small_model(folder: str) -> str:
    """A Llama of 5.8 M parameters, 22 MiB, in a directory as from_pretrained loads it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
    config = LlamaConfig(vocab_size=2048, num_attention_heads=4, eos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main(argv: list[str] | None = None) -> tuple[list[list[int]], dict]:
    """Generate; returns the new tokens of each prompt, and what offload counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a directory that from_pretrained can load")
    parser.add_argument("--host-memory", default="12MiB")
    parser.add_argument("--disk", help="folder for what does not fit; default: a temporary one")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="without offload")
    args = parser.parse_args(argv)

    prompts = [[1, 2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12]]
    first, many = torch.tensor(prompts[:1]), prompts[1:]
    with tempfile.TemporaryDirectory() as scratch:
        place = args.model or write_small_model(f"{scratch}/model")
        budgets = {"host_memory": args.host_memory, "disk": args.disk or scratch}
        settings = {"max_new_tokens": args.new_tokens, "do_sample": False}
        if args.plain:
            model = AutoModelForCausalLM.from_pretrained(place)
            ids = [first, *(torch.tensor([prompt]) for prompt in many)]
            rows = [model.generate(x, **settings)[0, x.shape[1] :].tolist() for x in ids]
            return rows, {}
        model = offload.from_pretrained(place, **budgets)
        run = offload.runtime(model)
        rows = [model.generate(first, **settings)[0, first.shape[1] :].tolist()]
        # Weights are loaded once a step for all prompts, which may round the last bit otherwise.
        rows += [list(row.tokens) for row in run.generate(many, max_new_tokens=args.new_tokens)]
        stats = run.stats()
        run.close()
    return rows, stats


if __name__ == "__main__":
    rows, stats = main()
    print("\n".join(map(str, rows)))
