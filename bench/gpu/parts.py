"""What there is to check on a GPU, in the order of its worth. Needs no torch.

Each part is one call's worth: at most nine minutes. ``emulated``: the same programs with tiny
shapes and the emulated device; what needs CUDA is shown as such. What cannot fit by arithmetic is
not run, and says so.
"""

from __future__ import annotations

from pathlib import Path

from gpu.fits import Stays, given_bytes, given_host_bytes, need
from gpu.runner import Part, Task, python
from gpu.shapes import GB, LORA, memory_bytes, named

NEEDS_CUDA = "needs CUDA"
TESTS = Path(__file__).parents[2] / "tests"
PEERS = ("deepspeed", "fsdp2", "torchao")
TIERED = {
    "ours-auto": Stays.NOTHING, "ours-swap": Stays.NOTHING, "ours-recompute": Stays.INPUTS,
    "ours-checkpointing": Stays.INPUTS, "checkpointing": Stays.INPUTS,
    "save_on_cpu": Stays.NOTHING,
}  # fmt: skip
PARITY_S, QUICK_S = 240.0, 530.0


class Catalogue:
    """Makes tasks; knows whether the device is emulated, and what the host is taken to have."""

    def __init__(self, out: Path, *, emulated: bool, host_gb: float | None = None) -> None:
        self._out = out
        self._emulated = emulated
        self._host_bytes = memory_bytes(host_gb)
        self._common = ("--out", str(out), *(("--emulated",) if emulated else ()))
        if host_gb is not None:
            self._common += ("--host-gb", str(host_gb))

    def task(self, name: str, file: str, *args: str, limit_s: float = 120,
             cuda: bool = False, refusal: str = "") -> Task:  # fmt: skip
        """One program of this folder; ``cuda``: it has no emulated form."""
        why = (NEEDS_CUDA if cuda else "") if self._emulated else refusal
        return Task(name, python(file, *args, *self._common), limit_s, why)

    def trained(self, shape: str, cap: str, tokens: str, *ways: str, batch: str = "1",
                limit_s: float = 150, options: tuple[str, ...] = ()) -> list[Task]:  # fmt: skip
        """Contestants that take the same steps under the same cap."""
        found = []
        for way in ways:
            args = (way, "--shape", shape, "--cap", cap, "--tokens", tokens, "--batch", batch)
            name = " ".join([shape, cap, f"{batch}x{tokens}", *(o[2:] for o in options), way])
            stays = Stays.INPUTS if "--checkpointing" in options else Stays.ALL
            found.append(self.task(
                name, "finetune.py", *args, *options, limit_s=limit_s, cuda=way in PEERS,
                refusal=self.refusal(shape, cap, int(tokens) * int(batch), way, stays),
            ))  # fmt: skip
        return found

    def refusal(self, shape: str, cap: str, tokens: int, way: str, stays: Stays) -> str:
        """Why a task cannot run, by arithmetic; "": it may."""
        known = LORA if shape == "lora" else named(shape, self._host_bytes)
        lora, stays = shape == "lora", TIERED.get(way, stays)
        cap_bytes = None if cap == "none" else self._cap_bytes(shape, cap, tokens, stays)
        return need(known, tokens, way, stays=stays, lora=lora).refusal(
            given_bytes(way, cap_bytes), given_host_bytes(self._host_bytes)
        )

    def _cap_bytes(self, shape: str, cap: str, tokens: int, stays: Stays) -> int:
        if cap == "quarter":
            unwrapped = need(named(shape, self._host_bytes), tokens, "plain", stays=stays)
            return unwrapped.device_bytes // 4
        return int(float(cap) * GB)

    def rerun(self, shape: str, cap: str, tokens: str, *ways: str, batch: str = "1",
              limit_s: float = 150) -> list[Task]:  # fmt: skip
        """Contestants that all run layers again in the backward pass."""
        options = ("--checkpointing",)
        return self.trained(shape, cap, tokens, *ways, batch=batch, limit_s=limit_s,
                            options=options)  # fmt: skip

    def long(self, tokens: str, cap: str, *ways: str) -> list[Task]:
        """One sequence, and what becomes of its activations."""
        return [
            self.task(f"{tokens} {way}", "activations.py", way, "--tokens", tokens, "--cap", cap,
                      limit_s=100, refusal=self.refusal("1.3b", cap, int(tokens), way, Stays.ALL))
            for way in ways
        ]  # fmt: skip

    def adapted(self, *ways: str) -> list[Task]:
        """LoRA; ours in a third of the weights' size."""
        cap = f"{2 * LORA.parameters / 3 / GB:.2f}"
        return [
            self.task(f"lora {way}", "lora.py", way, "--checkpointing", limit_s=200,
                      refusal=self.refusal("lora", cap if way == "ours" else "none", 2048, way,
                                           Stays.INPUTS))
            for way in ways
        ]  # fmt: skip

    def generated(self, name: str, way: str, cap: str, *options: str, limit_s: float = 200) -> Task:
        """One way to generate; some are no peers of the emulated device."""
        return self.task(name, "generate.py", way, "--cap", cap, *options, limit_s=limit_s,
                         cuda=way in ("accelerate", "flexllmgen"))  # fmt: skip

    def parity(self) -> list[Task]:
        """All tests in one process, which starts once; and rates."""
        checks = sorted(TESTS.glob("test_gpu*.py"))
        files = [str(f) for f in checks if f.stem != "test_gpu_check"]
        return [
            self.task("tests", "tests.py", *files, limit_s=190),
            self.task("probe quick", "probe.py", "--rounds", "1", limit_s=45),
        ]

    def quick(self) -> Part:
        """The cross-section: pairs that belong together one after the other, in one call."""
        short = ("--checkpointing", "--short")

        def trained(cap: str, way: str, limit_s: float) -> list[Task]:
            return self.trained("1.3b", cap, "4096", way, limit_s=limit_s, options=short)

        tasks = [
            *trained("none", "plain", 50), *trained("none", "ours", 60),
            *trained("quarter", "ours", 60), *trained("quarter", "fsdp2", 70),
            self.generated("one row ours", "ours", "6", "--short", limit_s=80),
            self.generated("one row accelerate", "accelerate", "6", "--short", limit_s=80),
            *trained("quarter", "deepspeed", 130),  # its CPUAdam is compiled in here
        ]  # fmt: skip
        return Part(0, "quick", "a cross-section in one call", tuple(tasks), QUICK_S)

    def parts(self) -> list[Part]:
        """All of them."""
        made = [
            ("parity", "tests marked gpu: P1 to P6; a quick probe", self.parity()),
            ("probe", "rates of every lane; frames or mapping", [
                self.task("probe", "probe.py"),
                self.task("mechanism", "mechanism.py", cuda=True),
            ]),
            ("fits", "wrapped and everything fits; a quarter of what the unwrapped run needs", [
                *self.trained("1.3b", "none", "4096", "plain", "ours", "ours-streamed"),
                *self.rerun("1.3b", "none", "4096", "plain"),
                *self.rerun("1.3b", "quarter", "4096", "ours", "fsdp2", "deepspeed",
                            "ours-streamed", "ours-again"),
            ]),
            ("8gb", "1.3 B in 8 GB, beside peers", [
                *self.rerun("1.3b", "8", "2048", "ours", *PEERS, "ours-again"),
                *self.trained("1.3b", "8", "2048", "ours-auto"),
            ]),
            ("16gb", "1.3 B and 3 B in 16 GB: batches, peers", [
                *self.rerun("1.3b", "16", "2048", "ours", batch="4", limit_s=90),
                *self.rerun("3b", "16", "2048", "ours", "deepspeed", "fsdp2"),
            ]),
            ("24gb", "3 B and the largest that the host holds, in 24 GB", [
                *self.rerun("3b", "24", "4096", "ours", "fsdp2"),
                *self.rerun("largest", "24", "4096", "ours", limit_s=300),
            ]),
            ("generate", "OPT-30B's shape in 16 GB: one row, and many", [
                self.generated("one row ours", "ours", "16"),
                self.generated("one row accelerate", "accelerate", "16"),
                self.generated("many rows ours", "many", "16"),
            ]),
            ("generate-more", "FlexLLMGen, int4", [
                self.generated("flexllmgen", "flexllmgen", "16", limit_s=120),
                self.generated("int4", "int4", "16", limit_s=240),
            ]),
            ("activations", "16 k and 32 k tokens; ours in 24 GB, unwrapped without a cap", [
                *self.long("16384", "none", "checkpointing", "save_on_cpu"),
                *self.long("16384", "24", "ours-checkpointing", "ours-recompute", "ours-swap",
                           "ours-auto"),
                *self.long("32768", "none", "checkpointing"),
                *self.long("32768", "24", "ours-checkpointing", "ours-recompute", "ours-auto"),
            ]),
            ("lora", "LoRA on three times the device memory", self.adapted("ours", "plain")),
            ("disk", "optimizer state on disk",
             self.trained("1.3b", "16", "4096", "ours-disk", limit_s=400)),
            ("kv", "keys and values beyond the cap: attention on the host, copies, as measured", [
                self.generated(f"{way} beyond the cap", way, "8", limit_s=180)
                for way in ("kv-host", "kv-device", "kv")
            ]),
        ]  # fmt: skip
        limits = {"parity": PARITY_S}
        return [
            Part(i, name, title, tuple(tasks), limits.get(name, Part.limit_s))
            for i, (name, title, tasks) in enumerate(made, 1)
        ]
