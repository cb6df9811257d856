"""Drop-in inference: the user's own ``generate`` and forward calls, while weights come and go."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offload
from offload.calls import Call, is_known
from offload.config import Tuning
from offload.prefetch.planner import plan
from offload.prefetch.uses import find_uses
from offload.run import Runtime
from offload.steps import CACHE_GROWTH, FORMS, GROWTH, Kind
from offload.tiers.home import Backing, HomeSpace
from offload.tiers.spec import KIB, MIB, Machine
from offload.track import Mode
from tests.conftest import CHUNK_BYTES, MACHINE, ZOO, Manager

NEW_TOKENS = 7


def _build(name: str) -> Any:
    """A seeded tiny model in evaluation mode."""
    import transformers as hf

    llama: dict[str, Any] = {
        "vocab_size": 192, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(11)
    if name == "opt":
        return hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=192, hidden_size=64, ffn_dim=128, num_hidden_layers=3,
                num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64,
            )
        ).eval()  # fmt: skip
    if name == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**llama)).eval()
    if name == "gemma":
        return hf.GemmaForCausalLM(hf.GemmaConfig(**llama, head_dim=16)).eval()
    return ZOO[name].build().eval()


def _generate(model: Any, rows: int = 2, **options: Any) -> Tensor:
    ids = torch.randint(5, 190, (rows, 6), generator=torch.Generator().manual_seed(3))
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, **options}
    result: Tensor = model.generate(ids, attention_mask=mask, **settings)
    return result


def _bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _small(model: nn.Module) -> int:
    """A budget in which little more than the hungriest module of each model fits."""
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    return max(int(0.3 * _bytes(model)), largest + 80 * KIB)


BUDGETS: dict[str, Callable[[nn.Module], int]] = {
    "small": _small, "half": lambda m: _bytes(m) // 2, "all": lambda m: 8 * _bytes(m)
}  # fmt: skip
MODELS = ("gpt2", "opt", "llama", "qwen2", "gemma", "t5", "mixtral")
CASES = [(name, "small") for name in MODELS] + [
    (name, budget) for name in ("llama-tied", "t5") for budget in ("half", "all")
]


@pytest.mark.parametrize(("name", "budget"), CASES)
def test_greedy_tokens_are_those_of_the_plain_model(
    manage: Manager, name: str, budget: str
) -> None:
    plain, model = _build(name), _build(name)
    run = manage(model, host_bytes=BUDGETS[budget](model))
    want = _generate(plain)
    for _ in range(2):
        assert torch.equal(_generate(model), want)
    counters = run.parts.engine.counters
    if budget == "all":
        assert counters.evictions == 0
    else:
        assert counters.evictions > 2 * NEW_TOKENS
        assert counters.planned_loads > 2 * NEW_TOKENS
    decode = run.parts.steps.forms["decode 2"]
    assert decode.steps == 2 * (NEW_TOKENS - 1)


def test_without_a_disk(manage: Manager) -> None:
    plain, model = _build("llama"), _build("llama")
    manage(model, disk=False)
    assert torch.equal(_generate(model), _generate(plain))


def _left_padded() -> dict[str, Any]:
    return {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])}


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "left-padded": _left_padded,
    "beams": lambda: {"num_beams": 3},
    "sampled": lambda: {"do_sample": True, "temperature": 0.8},
    "static cache": lambda: {"cache_implementation": "static"},
    "no cache": lambda: {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(manage: Manager, way: str) -> None:
    plain, model = _build("llama"), _build("llama")
    run = manage(model, host_bytes=_small(model))
    results = []
    for each in (plain, model, model):
        torch.manual_seed(5)
        results.append(_generate(each, **WAYS[way]()))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])
    assert run.parts.engine.counters.evictions > 2 * NEW_TOKENS


def test_beams_of_an_encoder_decoder_model(manage: Manager) -> None:
    plain, model = _build("t5"), _build("t5")
    run = manage(model, host_bytes=_small(model))
    want = _generate(plain, num_beams=3)
    for _ in range(2):
        assert torch.equal(_generate(model, num_beams=3), want)
    forms = run.parts.steps.forms
    assert list(forms) == ["encoder prefill 16", "prefill 8", "decode 8"]
    assert [t.steps for t in forms.values()][:2] == [2, 2]
    assert all(t.follower is not None for t in forms.values())


def test_a_pipeline_with_a_stop_string(manage: Manager) -> None:
    from transformers import pipeline

    from offload.data import Record
    from offload.tinymodel import train_tokenizer

    text = "the quick brown fox jumps over the lazy dog and the cat "
    tokenizer = train_tokenizer([Record("here", text=text * 3)])
    plain, model = _build("llama"), _build("llama")
    for each in (plain, model):
        each.resize_token_embeddings(len(tokenizer))
    model.load_state_dict(plain.state_dict())
    run = manage(model, host_bytes=_bytes(model) // 2)
    tokens = _generate(plain, rows=1, max_new_tokens=20)[0, 6:]
    stop = tokenizer.decode(tokens[8:10])
    outputs = []
    for each in (plain, model):
        pipe = pipeline("text-generation", model=each, tokenizer=tokenizer)
        prompt = tokenizer.decode(_generate(plain, rows=1, max_new_tokens=1)[0, :6])
        outputs.append(
            pipe(prompt, max_new_tokens=20, do_sample=False, stop_strings=[stop],
                 tokenizer=tokenizer)
        )  # fmt: skip
    assert outputs[0] == outputs[1]
    assert run.parts.engine.counters.evictions > 20


class Scaled(nn.Module):
    """Any module: layers, a layer of torch's, and a weight that its own forward writes to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(6))
        self.encoder = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:  # [rows, positions, 64]
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.weight.data.mul_(1.01)
            x = torch.tanh(layer(x))
        return torch.as_tensor(self.encoder(x))


def test_a_forward_pass_that_writes_to_its_weights(manage: Manager) -> None:
    plain, model = Scaled().eval(), Scaled().eval()
    run = manage(model, host_bytes=80 * KIB)
    with torch.no_grad():
        for i in range(6):
            x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(i))
            assert torch.equal(model(x), plain(x))
    assert run.parts.engine.counters.evictions > 30
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )


class Writer:
    """A logits processor that changes all weights now and then: user code between forwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3 == 0:
            for p in self.model.parameters():
                p.data.mul_(0.98)
        return scores


def test_weights_written_between_tokens(manage: Manager) -> None:
    plain, model = _build("llama"), _build("llama")
    run = manage(model, host_bytes=_small(model))
    for each in (plain, model):
        each.seen = _generate(each, logits_processor=[Writer(each)], max_new_tokens=12)
    assert torch.equal(model.seen, plain.seen)
    assert run.parts.engine.counters.evictions > 60
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_next_tokens_first_chunks_are_on_their_way(manage: Manager) -> None:
    model = _build("llama")
    run = manage(model, host_bytes=_small(model) + 8 * CHUNK_BYTES)
    in_flight = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        in_flight.append([c.id for c in run.parts.engine.space.loads()])
        return scores

    _generate(model, logits_processor=[look], max_new_tokens=16)
    planned = run.parts.steps.forms["decode 2"]
    assert planned.follower is not None
    assert any(in_flight[4:]), "the drive idles between tokens"


def test_a_growing_cache_is_watched_seldom_and_has_room(manage: Manager) -> None:
    model = _build("llama")
    run = manage(model, host_bytes=_bytes(model))
    steps, watched = run.parts.steps, list[int]()
    begin = steps.begin

    def note(kind: Kind, call: Call) -> Mode:
        mode = begin(kind, call)
        if mode is Mode.RECORD and call.goes_on:
            watched.append(call.extent)
        return mode

    steps.begin = note  # type: ignore[method-assign, assignment]
    _generate(model, min_new_tokens=100, max_new_tokens=100)
    growth = [b / a for a, b in itertools.pairwise(watched)]
    assert 2 <= len(growth) <= 4
    assert all(GROWTH < g <= 1.1 * CACHE_GROWTH for g in growth[:-1])
    assert steps.forms["decode 2"].trace is not None
    room_bytes = max(m.other_bytes for m in steps.forms["decode 2"].trace.moments)
    assert room_bytes >= GROWTH * run.parts.engine.ledger.peak_other_bytes


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_what_known_code_leaves_alone_is_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_dtype: str | None
) -> None:
    """Neither when it leaves, nor what its home showed while it was read."""
    seen = {"unchanged": 0, "_heed_mapping": 0}
    for name in seen:
        work = getattr(HomeSpace, name)

        def count(*args: Any, name: str = name, work: Callable[..., Any] = work) -> Any:
            seen[name] += 1
            return work(*args)

        monkeypatch.setattr(HomeSpace, name, count)
    tuning = Tuning(chunk_bytes=CHUNK_BYTES // 4, machine=MACHINE)
    for known in (True, False):
        model = _build("llama")
        if not known:
            model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        assert is_known(model) is known
        offload.wrap(
            model, None, host_memory=_small(model), disk=tmp_path, weight_dtype=weight_dtype,
            tuning=tuning,
        )  # fmt: skip
        with offload.runtime(model) as run:
            assert is_known(model) is known
            before = run.parts.engine.counters.evictions
            seen.update(dict.fromkeys(seen, 0))
            _generate(model, max_new_tokens=12)
            evictions = run.parts.engine.counters.evictions - before
        assert evictions > 40
        for times in seen.values():
            assert (times < 0.5 * evictions) is known


def test_weights_written_after_an_interrupted_pass(manage: Manager) -> None:
    plain, model = _build("llama"), _build("llama")
    run = manage(model, host_bytes=_small(model))
    _generate(model)

    class Stop(nn.Module):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            raise KeyboardInterrupt

    act, model.model.layers[2].mlp.act_fn = model.model.layers[2].mlp.act_fn, Stop()
    with pytest.raises(KeyboardInterrupt):
        _generate(model)
    model.model.layers[2].mlp.act_fn = act
    for each in (plain, model):
        for p in each.parameters():
            p.data.mul_(1.02)
    run.parts.engine.evict_all()
    assert torch.equal(_generate(model), _generate(plain))


def test_other_shapes_have_plans_of_their_own(manage: Manager) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=192, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=64,
    )  # fmt: skip
    model = BertModel(config).eval()
    run = manage(model, host_bytes=2 * MIB)
    steps = run.parts.steps
    with torch.no_grad():
        for length in (4, 4, 4, 32, 4, 32, 32, 4):
            model(input_ids=torch.ones(1, length, dtype=torch.int64))
        assert list(steps.forms) == ["prefill 32", "prefill 4"]
        assert [t.steps for t in steps.forms.values()] == [3, 5]
        for rows in range(1, 2 * FORMS):
            model(input_ids=torch.ones(1 << (rows % 10), 1, dtype=torch.int64))
        assert len(steps.forms) == FORMS
        model.encoder(torch.zeros(1, 4, 48))  # a part of it, by itself
        assert next(reversed(steps.forms)) == "encoder prefill 256"


def test_evaluation_within_a_training_step(manage: Manager) -> None:
    plain, model = _build("t5"), _build("t5")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    manage(model, optimizers[1], host_bytes=_bytes(model) // 2)
    seen: list[list[Tensor]] = [[], []]
    for each, optimizer, notes in zip((plain, model), optimizers, seen, strict=True):
        for step in range(3):
            ids = torch.full((1, 5), 3 + step)
            each(input_ids=ids, labels=ids).loss.backward()
            notes.append(_generate(each, max_new_tokens=3))
            optimizer.step()
            optimizer.zero_grad()
        notes.extend(p.detach().clone() for p in each.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_bytes_per_token_are_at_the_minimum(manage: Manager) -> None:
    model = _build("llama")
    run = manage(model, host_bytes=_bytes(model) // 2)
    _generate(model, max_new_tokens=12)
    trace = run.parts.steps.tracks[Kind.INFER].trace
    assert trace is not None
    slow = Machine(1e6, 1e6, 1e6, 1e6, 1e10)  # the drive is what matters
    capacity = run.parts.engine.ledger.capacity_bytes
    forecast = plan(trace, slow, capacity).forecast
    touched = {n.chunk for m in trace.moments for n in m.needs}
    embedding = run.parts.binding.homes[model.model.embed_tokens.weight]
    assert not touched & set(embedding.weight_chunks[1:-1]), "it is read row by row"
    needed = find_uses(trace).needed_bytes
    most = max(int(n) + m.other_bytes for n, m in zip(needed, trace.moments, strict=True))
    minimum = sum(trace.chunk_bytes[c] for c in touched) - (capacity - most)
    assert forecast.read_bytes <= minimum
    assert forecast.write_bytes == 0
    assert forecast.bound_s == pytest.approx(forecast.read_bytes / 1e6, rel=0.01)
    assert forecast.step_s <= 1.05 * forecast.bound_s


def _fitting(model: nn.Module, folder: Path) -> Runtime:
    tuning = Tuning(chunk_bytes=16 * KIB, machine=MACHINE)
    offload.wrap(model, host_memory=64 * MIB, disk=folder, tuning=tuning)
    return offload.runtime(model)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_when_all_fits_there_are_no_hooks(tmp_path: Path, name: str) -> None:
    plain, model = _build(name), _build(name)
    with _fitting(model, tmp_path) as run:
        run.parts.engine.evict_all()
        want = _generate(plain)
        _generate(model)
        assert torch.equal(_generate(model), want)
        assert run.parts.steps.tracks[Kind.INFER].mode is Mode.FITS
        units = [m for m in model.modules() if isinstance(m, nn.Linear)]
        assert not any(m._forward_pre_hooks for m in units)
        backings = {run.parts.engine.space.chunks[c].backing
                    for h in run.parts.binding.homes.values() for c in h.weight_chunks}  # fmt: skip
        assert backings == {Backing.RAM}
        assert torch.equal(_generate(model, max_new_tokens=30), _generate(plain, max_new_tokens=30))
