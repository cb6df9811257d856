"""What there is to check on a GPU, in the order of its worth. Needs no torch.

Each part is one call's worth: at most nine minutes. ``emulated``: the same programs with tiny
shapes and the emulated device; what needs CUDA is shown as such.
"""

from __future__ import annotations

from pathlib import Path

from gpu.runner import Part, Task, python

NEEDS_CUDA = "needs CUDA"
TESTS = Path(__file__).parents[2] / "tests"
PEERS = ("deepspeed", "fsdp2", "torchao")
GB = 10**9


class Catalogue:
    """Makes tasks; knows whether the device is emulated."""

    def __init__(self, out: Path, *, emulated: bool) -> None:
        self._out = out
        self._emulated = emulated
        self._common = ("--out", str(out), *(("--emulated",) if emulated else ()))

    def task(self, name: str, file: str, *args: str, limit_s: float = 120,
             cuda: bool = False) -> Task:  # fmt: skip
        """One program of this folder; ``cuda``: it has no emulated form."""
        why = NEEDS_CUDA if cuda and self._emulated else ""
        return Task(name, python(file, *args, *self._common), limit_s, why)

    def tests(self, file: Path) -> Task:
        """One file of tests marked gpu."""
        return self.task(file.stem, "tests.py", str(file), limit_s=420)

    def trained(self, shape: str, cap: str, tokens: str, *ways: str, batch: str = "1",
                limit_s: float = 150) -> list[Task]:  # fmt: skip
        """Contestants that take the same steps under the same cap."""
        found = []
        for way in ways:
            args = (way, "--shape", shape, "--cap", cap, "--tokens", tokens, "--batch", batch)
            name = f"{shape} {cap} {batch}x{tokens} {way}"
            found.append(self.task(name, "finetune.py", *args, limit_s=limit_s, cuda=way in PEERS))
        return found

    def parts(self) -> list[Part]:
        """All of them."""
        checks = sorted(TESTS.glob("test_gpu*.py"))
        checks = [f for f in checks if f.stem != "test_gpu_check"]
        if self._emulated:
            checks = checks[:1]
        made = [
            ("parity", "tests marked gpu: P1 to P6", [
                *map(self.tests, checks), self.task("probe quick", "probe.py", "--rounds", "1"),
            ]),
            ("probe", "rates of every lane; frames or mapping", [
                self.task("probe", "probe.py"),
                self.task("mechanism", "mechanism.py", cuda=True),
            ]),
            ("fits", "wrapped and everything fits; a quarter of what the unwrapped run needs", [
                *self.trained("1.3b", "none", "4096", "plain", "ours", "ours-streamed"),
                *self.trained("1.3b", "quarter", "4096", "ours", "ours-streamed"),
                *self.trained("1.3b", "quarter", "4096", "deepspeed", "fsdp2"),
            ]),
            ("8gb", "1.3 B in 8 GB, beside peers",
             self.trained("1.3b", "8", "2048", "ours", *PEERS, "ours-again")),
            ("16gb", "1.3 B and 3 B in 16 GB: batches, peers", [
                *self.trained("1.3b", "16", "2048", "ours", batch="4", limit_s=90),
                *self.trained("3b", "16", "2048", "ours", "deepspeed", "fsdp2"),
            ]),
            ("24gb", "3 B and the largest that the host holds, in 24 GB", [
                *self.trained("3b", "24", "4096", "ours", "fsdp2"),
                *self.trained("largest", "24", "4096", "ours", limit_s=300),
            ]),
            ("generate", "OPT-30B's shape in 16 GB: one row, and many", [
                self.task("one row ours", "generate.py", "ours", "--cap", "16", limit_s=200),
                self.task("one row accelerate", "generate.py", "accelerate", "--cap", "16",
                          limit_s=200, cuda=True),
                self.task("many rows ours", "generate.py", "many", "--cap", "16", limit_s=200),
            ]),
            ("generate-more", "FlexLLMGen, int4", [
                self.task("flexllmgen", "generate.py", "flexllmgen", "--cap", "16", cuda=True),
                self.task("int4", "generate.py", "int4", "--cap", "16", limit_s=240),
            ]),
            ("activations", "16 k and 64 k tokens", [
                self.task(f"{tokens} {way}", "activations.py", way, "--tokens", tokens,
                          "--cap", "24", limit_s=100)
                for tokens in ("16384", "65536")
                for way in ("checkpointing", "save_on_cpu", "ours-checkpointing",
                            "ours-recompute", "ours-swap", "ours-auto")
            ]),
            ("lora", "LoRA on three times the device memory", [
                self.task("lora ours", "lora.py", "ours", limit_s=200),
                self.task("lora plain", "lora.py", "plain", limit_s=200),
            ]),
            ("disk", "optimizer state on disk",
             self.trained("1.3b", "16", "4096", "ours-disk", limit_s=400)),
            ("kv", "keys and values beyond the cap: attention on the host, copies, as measured", [
                self.task(f"{way} beyond the cap", "generate.py", way, "--cap", "8", limit_s=180)
                for way in ("kv-host", "kv-device", "kv")
            ]),
        ]  # fmt: skip
        return [Part(i, *part[:2], tuple(part[2])) for i, part in enumerate(made, 1)]
