"""Made-up data for the report's tests: a step of any size, consistent in bytes and seconds.

`made` lets a small model of a machine run: modules compute in turn, the disk reads their chunks
ahead of them and writes back what they changed, and who comes too early waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GIB = 2**30
MIB = 2**20

LAYER = (
    ("self_attn.q_proj", 1.0),
    ("self_attn.k_proj", 0.25),
    ("self_attn.v_proj", 0.25),
    ("self_attn.o_proj", 1.0),
    ("mlp.gate_proj", 2.7),
    ("mlp.up_proj", 2.7),
    ("mlp.down_proj", 2.7),
)
PHASES = ("forward", "backward", "update")


@dataclass(frozen=True)
class Size:
    """What is made. ``visits``: times each module is met in a pass, as by micro-batches."""

    name: str = "LlamaForCausalLM"
    layers: int = 12
    chunk_bytes: int = 16 * MIB
    chunks_a_module: int = 1
    visits: int = 1
    host_bytes: int = 2 * GIB
    device: str | None = None
    read_bytes_per_s: float = 1.9e9
    write_bytes_per_s: float = 4.2e9
    steps: int = 40
    hostile: str = ""  # the first module and its tensors are called this

    @property
    def module_names(self) -> list[str]:
        names = [f"model.layers.{i}.{part}" for i in range(self.layers) for part, _ in LAYER]
        return [self.hostile or "model.embed_tokens", *names, "lm_head"]


SMALL = Size()
HUNDRED_B = Size(
    layers=80, chunk_bytes=128 * MIB, chunks_a_module=3, visits=2, host_bytes=96 * GIB,
    device="H200", steps=2000,
)  # fmt: skip


@dataclass
class Lane:
    """Spans of one lane, in the order of their start."""

    columns: dict[str, list[Any]] = field(
        default_factory=lambda: {k: [] for k in ("start_s", "end_s", "chunk", "bytes", "module")}
    )
    free_s: float = 0.0

    def add(self, ready_s: float, took_s: float, chunk: int, size_bytes: int, module: int) -> float:
        """The next span begins when the lane is free; returns when it ends."""
        start_s = max(ready_s, self.free_s)
        self.free_s = start_s + took_s
        values = (start_s, self.free_s, chunk, size_bytes, module)
        for column, value in zip(self.columns.values(), values, strict=True):
            column.append(value)
        return self.free_s

    def to_dict(self) -> dict[str, Any]:
        c = self.columns
        busy_s = sum(c["end_s"]) - sum(c["start_s"])
        return {"bytes": sum(c["bytes"]), "busy_s": busy_s, "spans": c}


class _Step:
    """Runs one made-up step."""

    def __init__(self, size: Size) -> None:
        self.size = size
        names = ("compute", "update", "read", "write", *(("h2d", "d2h") if size.device else ()))
        self.lanes = {name: Lane() for name in names}
        self.stalls: dict[str, list[Any]] = {
            k: [] for k in ("start_s", "end_s", "cause", "chunk", "module")
        }
        self.phases: list[dict[str, Any]] = []
        self.memory: list[tuple[float, list[float]]] = [(0.0, [0.3, 0, 0, 0, 0])]
        self.now_s = 0.0

    def run(self) -> None:
        modules = len(self.size.module_names)
        orders = (range(modules), range(modules - 1, -1, -1), range(modules))
        for phase, order in zip(PHASES, orders, strict=True):
            start_s = self.now_s
            visits = self.size.visits if phase != "update" else 1
            steps = [m for _ in range(visits) for m in order]
            for i, module in enumerate(steps):
                self._visit(phase, module, i / len(steps))
            self.phases.append({"name": phase, "start_s": start_s, "end_s": self.now_s})

    def _visit(self, phase: str, module: int, progress: float) -> None:
        size, each = self.size, self.size.chunks_a_module
        weight = 1 + (module * 7 % 5) / 3
        lane = self.lanes["update" if phase == "update" else "compute"]
        kinds = 2 if phase == "update" else 1
        for chunk in range(module * each, module * each + each):
            number = chunk + (len(size.module_names) * each if kinds == 2 else 0)
            read_s = size.chunk_bytes / size.read_bytes_per_s
            got_s = self.lanes["read"].add(
                max(0.0, self.now_s - 6 * read_s), read_s, number, size.chunk_bytes, module
            )
            if "h2d" in self.lanes:
                got_s = self.lanes["h2d"].add(got_s, read_s / 9, number, size.chunk_bytes, module)
            if got_s > self.now_s:
                self._wait(got_s, number, module)
            took_s = read_s * (0.9 if phase == "forward" else 1.1) * weight / 1.6
            self.now_s = lane.add(self.now_s, took_s, -1, 0, module)
            if phase != "forward":
                write_s = size.chunk_bytes / size.write_bytes_per_s
                if "d2h" in self.lanes:
                    self.lanes["d2h"].add(self.now_s, write_s / 8, number, size.chunk_bytes, module)
                self.lanes["write"].add(self.now_s, write_s, number, size.chunk_bytes, module)
            self._remember(phase, progress)

    def _wait(self, until_s: float, chunk: int, module: int) -> None:
        values = (self.now_s, until_s, "read", chunk, module)
        for column, value in zip(self.stalls.values(), values, strict=True):
            column.append(value)
        self.now_s = until_s

    def _remember(self, phase: str, progress: float) -> None:
        grown = {"forward": progress, "backward": 1 - progress, "update": 0.0}[phase]
        gradients = 0.02 if phase == "forward" else 0.16 if phase == "backward" else 0.06
        optimizer = 0.34 if phase == "update" else 0.03
        shares = [0.24 + 0.06 * grown, gradients, optimizer, 0.42 * grown, 0.05]
        self.memory.append((self.now_s, shares))


def _memory(step: _Step, size: Size) -> dict[str, Any]:
    kinds = ("weights", "gradients", "optimizer", "activations", "staging")
    tiers = {"host": size.host_bytes, **({"device": 80 * GIB} if size.device else {})}
    memory = {}
    for tier, budget_bytes in tiers.items():
        columns = {
            kind: [int(budget_bytes * shares[i]) for _, shares in step.memory]
            for i, kind in enumerate(kinds)
        } | {"kv": [0] * len(step.memory), "fixed": [budget_bytes // 50] * len(step.memory)}
        memory[tier] = {
            "budget_bytes": budget_bytes, "t_s": [t for t, _ in step.memory], "kinds": columns,
            "used_bytes": [sum(v) for v in zip(*columns.values(), strict=True)],
        }  # fmt: skip
    return memory


def _chunks(size: Size) -> dict[str, list[Any]]:
    each, names = size.chunks_a_module, size.module_names
    chunks: dict[str, list[Any]] = {"bytes": [], "kind": [], "home": [], "tensors": []}
    for kind in ("weights", "optimizer"):
        for name in names:
            for i in range(each):
                chunks["bytes"].append(size.chunk_bytes)
                chunks["kind"].append(kind)
                chunks["home"].append("host" if len(chunks["home"]) % 4 == 0 else "disk")
                chunks["tensors"].append([f"{name}.weight", *([f"{name}.bias"] if i == 0 else [])])
    return chunks


def _modules(step: _Step, size: Size) -> list[dict[str, Any]]:
    rows = []
    for name in size.module_names:
        whole = size.chunk_bytes * size.chunks_a_module
        home = {"host": whole // 4, "disk": whole - whole // 4}
        row = {"name": name, "bytes": whole, "home_bytes": home, "compute_s": 0.0, "stall_s": 0.0}
        rows.append(row | {"read_bytes": 0, "write_bytes": 0})
    for lane, key in (("compute", "compute_s"), ("update", "compute_s")):
        spans = step.lanes[lane].columns
        for start_s, end_s, module in zip(
            spans["start_s"], spans["end_s"], spans["module"], strict=True
        ):
            rows[module][key] += end_s - start_s
    for lane, key in (("read", "read_bytes"), ("write", "write_bytes")):
        spans = step.lanes[lane].columns
        for size_bytes, module in zip(spans["bytes"], spans["module"], strict=True):
            rows[module][key] += size_bytes
    stalls = zip(*(step.stalls[k] for k in ("start_s", "end_s", "module")), strict=True)
    for start_s, end_s, module in stalls:
        rows[module]["stall_s"] += end_s - start_s
    return rows


def _history(size: Size, step_s: float) -> dict[str, list[Any]]:
    steps = list(range(1, size.steps + 1))
    loss = [None if i % 9 == 8 else 2.2 + 6 / (1 + i / 4) + 0.07 * (i * 37 % 11) for i in steps]
    times = [step_s * (1.9 if i == 1 else 1 + 0.03 * (i * 29 % 7 - 3)) for i in steps]
    return {
        "step": steps, "loss": loss, "step_s": times,
        "tokens_per_s": [4096 / t for t in times],
    }  # fmt: skip


def _machine(size: Size) -> dict[str, Any]:
    rates = {
        "read_bytes_per_s": size.read_bytes_per_s, "write_bytes_per_s": size.write_bytes_per_s,
        "mixed_read_bytes_per_s": 1.4e9, "mixed_write_bytes_per_s": 1.4e9, "copy_bytes_per_s": 1e10,
        "h2d_bytes_per_s": 2.2e10 if size.device else 0.0, "d2h_bytes_per_s": 0.0,
        "disk_latency_s": 1e-4,
    }  # fmt: skip
    versions = {"python": "3.12.4", "torch": "2.13.0", "offload": "0.1.0"}
    return {
        "cores": 16, "host_bytes": 128 * GIB, "device": size.device, "rates": rates,
        "versions": versions,
    }  # fmt: skip


ADVICE = (
    "Raise host_memory by 1.5 GiB: 12 more chunks stay in memory and a step reads 8% less.",
    "Pass two micro-batches with run.accumulate: the weights are read once for both.",
    'Keep the optimizer\'s state in state_dtype="bf16": half of its bytes.',
)


def made(size: Size = SMALL) -> dict[str, Any]:
    """A report's data, as the schema (version 1) has it."""
    step = _Step(size)
    step.run()
    lanes = {name: lane.to_dict() for name, lane in step.lanes.items()}
    stall_s = sum(step.stalls["end_s"]) - sum(step.stalls["start_s"])
    step_s, bound_s, memory = step.now_s, lanes["read"]["busy_s"], _memory(step, size)
    measured = {
        "step_s": step_s, "stall_s": stall_s, "peak_bytes": max(memory["host"]["used_bytes"]),
        "read_bytes": lanes["read"]["bytes"], "write_bytes": lanes["write"]["bytes"],
    }  # fmt: skip
    chunks = _chunks(size)
    off = (0.94, 0.7, 1.0, 1.0, 0.9)
    text = (
        f"Reading from disk sets the pace: a step takes {step_s:.2f} s, "
        f"{step_s / bound_s:.2f} times the {bound_s:.2f} s that the disk needs."
    )
    return {
        "schema": 1, "offload": "0.1.0", "made": "2026-11-21T19:00:00Z", "task": "finetune",
        "machine": _machine(size),
        "model": {
            "name": size.name, "parameters": sum(chunks["bytes"]) // 4,
            "chunk_bytes": size.chunk_bytes, "chunks": len(chunks["bytes"]),
        },
        "budgets": {
            "device": 80 * GIB if size.device else None, "host": size.host_bytes,
            "disk": 200 * size.host_bytes,
        },
        "verdict": {
            "text": text, "binding": "disk", "ratio": step_s / bound_s, "advice": list(ADVICE),
        },
        "step": {
            "step_s": step_s, "bound_s": bound_s, "wire_bound_s": 0.9 * bound_s, "binding": "disk",
            "phases": step.phases, "lanes": lanes, "stalls": step.stalls, "memory": memory,
        },
        "chunks": chunks, "modules": _modules(step, size),
        "forecast": {k: v * f for (k, v), f in zip(measured.items(), off, strict=True)},
        "measured": measured, "history": _history(size, step_s),
    }  # fmt: skip
