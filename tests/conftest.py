"""Shared by the tests: tiny models, one training loop, and runs that are compared bit by bit.

`Zoo` has the models of promise P1, made from configs, never downloaded. `Twins` runs the same
piece of user code on a plain model and on a managed one and compares all that it touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import offload
from offload.config import Tuning
from offload.run import Runtime
from offload.tiers.home import Backing
from offload.tiers.spec import KIB, MIB, Machine

MACHINE = Machine(1.8e9, 5.5e9, 1.4e9, 1.4e9, 1e10)  # never probed in tests
CHUNK_BYTES = 16 * KIB

Numbers = dict[str, Any]
BuildOptimizer = Callable[[list[nn.Parameter]], Optimizer]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny models: a second thread only costs


# -- runs -----------------------------------------------------------------------------------


@dataclass
class Manager:
    """Wraps models with test settings, and closes what a test leaves open."""

    folder: Path
    opened: list[nn.Module] = field(default_factory=list)

    def __call__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        host_bytes: int = 64 * MIB,
        disk: bool = True,
        prefetch: bool = True,
        adversary: int | None = None,
        max_grad_norm: float | None = None,
        activations: str = "keep",
        step_in_backward: bool = False,
    ) -> Runtime:
        """``offload.wrap`` with small chunks, poisoned frames, made-up rates, activations kept."""
        tuning = Tuning(
            chunk_bytes=CHUNK_BYTES, prefetch=prefetch, machine=MACHINE, poison=True,
            adversary=adversary, keep_hooks=True,
        )  # fmt: skip
        offload.wrap(
            model, optimizer, host_memory=host_bytes, disk=self.folder if disk else None,
            max_grad_norm=max_grad_norm, step_in_backward=step_in_backward,
            activations=activations, tuning=tuning,
        )  # fmt: skip
        self.opened.append(model)
        return offload.runtime(model)

    @staticmethod
    def watch(run: Runtime) -> Watch:
        """An observer for `Zoo.train`."""
        return Watch(run)

    def close(self) -> None:
        """Close the runs that are still open."""
        for model in self.opened:
            if "_offload" in model.__dict__:
                offload.runtime(model).close()
        self.opened.clear()


@pytest.fixture
def manage(tmp_path: Path) -> Iterator[Manager]:
    """Wrap a model for this test."""
    manager = Manager(tmp_path / "spill")
    yield manager
    manager.close()


def same(a: object, b: object) -> bool:
    """Equality of nested results, tensors bit for bit (NaN equals NaN)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def copied(value: object) -> Any:
    """A deep copy of nested results as plain tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [copied(v) for v in value]
    return value


# -- the models of P1 -----------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """A model to train and the batches it eats."""

    build: Callable[[], Any]
    batch: Callable[[torch.Generator], dict[str, Tensor]]


def _tokens(generator: torch.Generator) -> dict[str, Tensor]:
    x = torch.randint(0, 192, (2, 12), generator=generator)
    return {"input_ids": x, "labels": x}


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=192, n_embd=48, n_layer=3, n_head=4, n_positions=32, bos_token_id=0,
            eos_token_id=0,
        )
    )  # fmt: skip


def _llama(*, tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=192, hidden_size=64, intermediate_size=112, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
            tie_word_embeddings=tied,
        )
    )  # fmt: skip


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=192, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
            image_size=16, patch_size=8, num_labels=5, hidden_dropout_prob=0.1,
        )
    )  # fmt: skip


def _images(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "labels": torch.randint(0, 5, (2,), generator=generator),
    }


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=192, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2, max_position_embeddings=32, output_router_logits=True,
        )
    )  # fmt: skip


ZOO = {
    "gpt2": Workload(_gpt2, _tokens),
    "llama": Workload(lambda: _llama(tied=False), _tokens),
    "llama-tied": Workload(lambda: _llama(tied=True), _tokens),
    "t5": Workload(_t5, _tokens),
    "vit": Workload(_vit, _images),
    "mixtral": Workload(_mixtral, _tokens),
}


@dataclass
class Zoo:
    """Builds and trains the models of `ZOO`."""

    @staticmethod
    def same(a: object, b: object) -> bool:
        return same(a, b)

    def build(self, name: str, checkpointing: str = "off") -> nn.Module:
        """A seeded model in training mode. ``checkpointing``: off, reentrant, non-reentrant."""
        torch.manual_seed(11)
        model: nn.Module = ZOO[name].build().train()
        if checkpointing != "off":
            reentrant = checkpointing == "reentrant"
            old: Any = getattr(model, "gradient_checkpointing_enable", None)  # before 5.23
            enable: Any = getattr(model, "activation_checkpointing_enable", old)
            enable({"use_reentrant": reentrant})
        return model

    def train(
        self, name: str, model: nn.Module, optimizer: Optimizer, *, steps: int = 10,
        watch: Watch | None = None,
    ) -> Numbers:  # fmt: skip
        """Steps of two micro-batches with clipping: all losses, norms and final weights."""
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(2)  # for dropout
        losses, norms = [], []
        for _ in range(steps):
            for _ in range(2):
                loss = model(**ZOO[name].batch(generator)).loss / 2
                if watch is not None:
                    watch.after_forward()
                loss.backward()
                if watch is not None:
                    watch.after_backward()
                losses.append(loss.item())
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
        return {"losses": losses, "norms": norms, "weights": copied(model.state_dict())}


@pytest.fixture(scope="session")
def zoo() -> Zoo:
    return Zoo()


class Watch:
    """Sees that weights really left between forward and backward, and came back."""

    def __init__(self, run: Runtime) -> None:
        self.gone_between = 0  # weight chunks not in memory when the forward pass was over
        self.loaded_in_backward = 0
        self._run = run
        self._loads_before = 0

    def after_forward(self) -> None:
        """Called between the forward and the backward pass."""
        chunks = self._run.parts.engine.space.chunks
        homes = self._run.parts.binding.homes.values()
        weights = {c for home in homes for c in home.weight_chunks}
        self.gone_between += sum(chunks[c].backing is Backing.FILE for c in weights)
        self._loads_before = self._loads()

    def after_backward(self) -> None:
        """Called when the backward pass is over."""
        self.loaded_in_backward += self._loads() - self._loads_before

    def _loads(self) -> int:
        counters = self._run.parts.engine.counters
        return counters.demand_loads + counters.planned_loads


# -- twins: the same user code on a plain and on a managed model ------------------------------


def build_mlp() -> nn.Module:
    """Seven linear layers, 100 thousand weights, with dropout."""
    torch.manual_seed(3)
    layers: list[nn.Module] = [nn.Linear(64, 128)]
    for _ in range(5):
        layers += [nn.ReLU(), nn.Linear(128, 128)]
    return nn.Sequential(*layers, nn.Dropout(0.1), nn.Linear(128, 8))


def adamw(params: list[nn.Parameter]) -> Optimizer:
    """AdamW with a learning rate at which ten steps matter."""
    return torch.optim.AdamW(params, lr=1e-2)


@dataclass
class Life:
    """What user code has in hand: a model, its optimizer, and notes of what it saw."""

    model: nn.Module
    optimizer: Optimizer
    run: Runtime | None  # None: unwrapped
    seen: list[Any] = field(default_factory=list)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def evict(self) -> None:
        """Send everything home, where there is a home."""
        if self.run is not None:
            self.run.parts.engine.evict_all()

    def note(self, *values: object) -> None:
        """Keep copies of values, to be compared between the twins."""
        self.seen.extend(copied(v) for v in values)

    def loss(self, seed: int, rows: int = 4) -> Tensor:
        """Cross-entropy of a seeded batch."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, 64, generator=generator)
        y = torch.randint(0, 8, (rows,), generator=generator)
        return cross_entropy(self.model(x), y)

    def steps(self, count: int = 3, seed: int = 0) -> None:
        """Ordinary training steps, noting the losses."""
        for i in range(count):
            loss = self.loss(seed + i)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.note(loss)


@dataclass(frozen=True)
class Mode:
    """One way to run the managed twin."""

    host_bytes: int
    prefetch: bool = True
    adversary: int | None = None


MODES = {
    "planned": Mode(640 * KIB),
    "on-demand": Mode(480 * KIB, prefetch=False),
    "adversarial": Mode(480 * KIB, adversary=5),
}


@dataclass
class Twins:
    """Runs a life twice, plain and managed, and compares what it noted and left behind."""

    manage: Manager
    mode: Mode

    def __call__(
        self,
        live: Callable[[Life], None],
        build: Callable[[], nn.Module] = build_mlp,
        build_optimizer: BuildOptimizer = adamw,
        host_bytes: int | None = None,
    ) -> None:
        plain = self.start(build, build_optimizer)
        live(plain)
        managed = self.start(build, build_optimizer)
        run = managed.run = self.manage(
            managed.model, managed.optimizer, prefetch=self.mode.prefetch,
            host_bytes=host_bytes or self.mode.host_bytes, adversary=self.mode.adversary,
        )  # fmt: skip
        live(managed)
        assert run.parts.engine.counters.evictions > 10, "all of it fitted: nothing is proved"
        self.compare(plain, managed)

    @staticmethod
    def start(build: Callable[[], nn.Module], build_optimizer: BuildOptimizer) -> Life:
        """A fresh plain life."""
        model = build()
        optimizer = build_optimizer(list(model.parameters()))
        torch.manual_seed(4)
        return Life(model, optimizer, None)

    @staticmethod
    def compare(plain: Life, managed: Life) -> None:
        """Assert that both saw and left the same."""
        assert len(plain.seen) == len(managed.seen)
        for i, (a, b) in enumerate(zip(plain.seen, managed.seen, strict=True)):
            assert same(a, b), f"note {i}: {a} without, {b} with offload"
        assert same(plain.model.state_dict(), managed.model.state_dict())
        assert same([p.grad for p in plain.params], [p.grad for p in managed.params])
        assert same(plain.optimizer.state_dict()["state"], managed.optimizer.state_dict()["state"])


@pytest.fixture(params=list(MODES))
def twins(manage: Manager, request: pytest.FixtureRequest) -> Twins:
    """Compare a life with and without offload, in each mode."""
    return Twins(manage, MODES[request.param])
