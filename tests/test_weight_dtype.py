"""Weights in 4 and 8 bits: what is stored, what it is widened to, where it may lie meanwhile."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import offload
from offload.config import Tuning
from offload.groupwise import FORMATS, GROUP, Format, Scratch, pack
from offload.quantised import BLOCK_ELEMENTS, Quantised, QuantisedLinear, quantise, scratch_bytes
from offload.tiers.spec import KIB, Machine
from tests.framed import tuning as framed_tuning

MACHINE = Machine(2e9, 2e9, 1e9, 1e9, 8e9, 8e9)
IDS = torch.arange(1, 25).reshape(2, 12)
both = pytest.mark.parametrize("name", ["int4", "int8"])


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A Llama of 500 thousand weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=192, hidden_size=128, intermediate_size=200, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    for param in model.parameters():  # and not buffers, which a loaded model has in float32
        param.data = param.data.to(dtype)
    return model


def quantised(model: Any, name: str) -> Any:
    """The model with its weights quantised, and nothing of it managed."""
    quantise(
        model, FORMATS[name], None, lambda s: torch.empty(s, dtype=torch.uint8), lambda _: None
    )
    return model


def unpack(packed: Tensor, form: Format, columns: int) -> Tensor:
    """The weights [rows, columns] in float32."""
    rows, groups = packed.shape[0], -(-columns // GROUP)
    return Scratch(rows * groups * GROUP).unpack(packed, form, torch.float32)[:, :columns]


def decoded(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of a pass over two sequences, and five tokens generated from them."""
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        mask = torch.ones_like(IDS)
        tokens = model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
    return logits, tokens


def streamed(**changes: Any) -> Tuning:
    """Small chunks, poisoned frames, late reads."""
    values: dict[str, Any] = {"chunk_bytes": 16 * KIB, "machine": MACHINE, "poison": True}
    return Tuning(**(values | {"adversary": 3, "keep_hooks": True} | changes))


# -- groups ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FORMATS)), st.integers(1, 5), st.integers(1, 200),
    st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 200.0]), st.sampled_from([-50.0, 0.0, 0.3]),
    st.integers(0, 99),
)  # fmt: skip
def test_no_weight_is_moved_by_more_than_half_a_step(
    name: str, rows: int, columns: int, spread: float, centre: float, seed: int
) -> None:
    form = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, columns, generator=generator) * spread + centre
    packed = pack(weights, form)
    assert packed.shape == (rows, form.row_bytes(columns))
    found = unpack(packed, form, columns)
    groups = -(-columns // GROUP)
    numbers = packed[:, -4 * groups :].contiguous().view(torch.float16).float()
    scale = numbers[:, :groups].repeat_interleave(GROUP, 1)
    # Beside the half step: what float32 itself rounds, at the size of the values.
    allowed = 0.5 * scale[:, :columns] + 3e-7 * weights.abs().amax()
    assert ((found - weights).abs() <= allowed).all()
    least, most = weights.aminmax()
    finest = (most - least) / (2**form.bits - 1)  # of one group, if it had them all
    assert (scale <= 1.01 * finest + 2e-3 * weights.abs().amax() + 1e-7).all()


@both
def test_weights_that_are_codes_come_back_exactly(name: str) -> None:
    form = FORMATS[name]
    codes = torch.randint(0, 2**form.bits, (9, 192))
    codes[:, ::GROUP], codes[:, 1::GROUP] = 0, 2**form.bits - 1  # each group has its whole range
    weights = codes * 0.25 - 3.0
    assert torch.equal(unpack(pack(weights, form), form, 192), weights)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_widened_values_are_those_of_exact_arithmetic(name: str, dtype: torch.dtype) -> None:
    form, rows, columns = FORMATS[name], 64, 320
    codes = torch.randint(0, 2**form.bits, (rows, columns), dtype=torch.uint8)
    scale, zero = torch.randn(2, rows, columns // GROUP).half()
    stored = codes if form.bits == 8 else codes[:, :160] | codes[:, 160:] << 4
    numbers = torch.cat((scale, zero), 1).view(torch.uint8)
    scratch = Scratch(rows * columns)
    found = scratch.unpack(torch.cat((stored, numbers), 1), form, dtype)
    spread = [x.double().repeat_interleave(GROUP, 1) for x in (scale, zero)]
    assert torch.equal(found, (codes * spread[0] + spread[1]).float().to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_cannot_be_told_are_refused_by_name(bad: float) -> None:
    broken = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(64, 64), broken)
    with torch.no_grad():
        broken.weight[3, 5] = bad
    with pytest.raises(offload.OffloadError, match=r"1\.weight cannot be int4"):
        quantised(model, "int4")


# -- layers ---------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("columns", [64, 100, 1536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_with_what_its_weight_shows(
    name: str, columns: int, dtype: torch.dtype
) -> None:
    rows = 1200  # more than a block for the widest, and not a multiple of one
    assert rows % (BLOCK_ELEMENTS // 1536) < rows
    plain = nn.Linear(columns, rows).to(dtype)
    layer = quantised(copy.deepcopy(plain), name)
    x = torch.randn(3, 2, columns).to(dtype).requires_grad_()
    expected = nn.functional.linear(x.float(), layer.weight.float(), plain.bias.float())
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    y = layer(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    wanted = grad.float() @ layer.weight.float()
    torch.testing.assert_close(found.float(), wanted, rtol=4 * tolerance, atol=4 * tolerance)
    step = {"int4": 1 / 15, "int8": 1 / 255}[name] * 2 / columns**0.5
    assert (layer.weight - plain.weight).abs().max() <= 0.51 * step + 0.01 * step / tolerance


def test_a_layer_stays_the_same_object_with_its_hooks() -> None:
    layer: Any = nn.Linear(64, 32)
    seen: list[object] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    model = quantised(nn.Sequential(layer), "int4")
    model(torch.randn(1, 64))
    assert model[0] is layer
    assert seen
    assert "int4" in repr(layer)
    with pytest.raises(offload.OffloadError, match="int4 codes"):
        layer.weight = nn.Parameter(torch.zeros(32, 64))
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, QuantisedLinear)


def test_autocast_has_its_way_and_inference_mode_leaves_nothing_behind() -> None:
    layer = quantised(nn.Linear(64, 32), "int4")
    x = torch.randn(2, 64, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert layer.weight.shape == (32, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype is torch.bfloat16


# -- placements -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_weights_decode_to_the_bits_of_resident_ones(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    expected = decoded(quantised(llama(dtype=dtype), name))
    model = llama(dtype=dtype)
    budget = {"int4": 360, "int8": 420}[name] * KIB
    offload.wrap(
        model, None, host_memory=budget, disk=tmp_path, weight_dtype=name, tuning=streamed()
    )
    with offload.runtime(model) as run:
        for _ in range(2):
            assert all(map(torch.equal, decoded(model), expected))
        assert run.parts.engine.counters.evictions > 50, "all of it fitted: nothing is proved"
        assert run.stats()["tiers"]["host"]["peak_bytes"] <= budget
    resident = llama(dtype=dtype)
    offload.wrap(resident, None, host_memory="1GiB", weight_dtype=name)
    with offload.runtime(resident):
        assert all(map(torch.equal, decoded(resident), expected))


@pytest.mark.parametrize("device", ["emulated", None])
def test_streamed_weights_in_frames(device: str | None, tmp_path: Path) -> None:
    plain = quantised(llama(dtype=torch.bfloat16), "int4")
    expected = decoded(plain)
    model = quantised(llama(), "int4")  # codes of float32 weights, which are not those of bfloat16
    with torch.no_grad():
        for a, b in zip(model.modules(), plain.modules(), strict=True):
            if isinstance(a, Quantised) and isinstance(b, Quantised):
                a.packed.copy_(b.packed)
    offload.wrap(
        model, None, device=device, device_memory="300KiB", host_memory="700KiB", disk=tmp_path,
        compute_dtype=torch.bfloat16, tuning=framed_tuning(chunk_bytes=16 * KIB),
    )  # fmt: skip
    with offload.runtime(model) as run:
        assert all(map(torch.equal, decoded(model), expected))
        assert run.stats()["device"]["uploaded_bytes"]


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5", "vit", "mixtral"])
def test_other_models(name: str, zoo: Any, tmp_path: Path) -> None:
    from tests.conftest import ZOO

    batch = ZOO[name].batch(torch.Generator().manual_seed(0))
    reference = quantised(zoo.build(name).eval(), "int4")
    with torch.no_grad():
        expected = reference(**batch).logits
    model = zoo.build(name).eval()
    offload.wrap(
        model, None, host_memory="280KiB", disk=tmp_path, weight_dtype="int4", tuning=streamed()
    )
    with offload.runtime(model), torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_a_tied_head_has_codes_and_the_embedding_keeps_its_rows() -> None:
    model = llama(tied=True)
    rows = model.model.embed_tokens.weight.detach().clone()
    quantised(model, "int8")
    assert torch.equal(model.model.embed_tokens.weight, rows)
    assert isinstance(model.lm_head, QuantisedLinear)
    assert (model.lm_head.weight - rows).abs().max() < 1e-3
    twins = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    twins[1].weight = twins[0].weight
    quantised(twins, "int4")
    assert twins[0].packed is twins[1].packed


def test_from_pretrained_quantises_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    expected = decoded(quantised(llama(dtype=torch.bfloat16), "int4"))
    model = offload.from_pretrained(
        tmp_path / "saved", weight_dtype="int4", host_memory=360 * KIB, disk=tmp_path / "spill",
        tuning=streamed(),
    )  # fmt: skip
    assert "29 weights are int4 now" in capsys.readouterr().err
    with offload.runtime(model) as run:
        assert all(map(torch.equal, decoded(model), expected))
        with pytest.raises(offload.OffloadError, match="quantised"):
            run.export(tmp_path / "out")


# -- training -------------------------------------------------------------------------------


def test_trained_weights_are_not_quantised_and_that_is_said(tmp_path: Path) -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(offload.OffloadError, match="cannot be trained"):
        offload.wrap(model, optimizer, host_memory="1GiB", weight_dtype="int4")
    with pytest.raises(offload.OffloadError, match="int4, int8"):
        offload.wrap(model, None, host_memory="1GiB", weight_dtype="nf4")
    with pytest.raises(offload.BudgetError, match="int4"):
        offload.wrap(model, None, host_memory="200KiB", weight_dtype="int4")
    with pytest.raises(offload.BudgetError):
        offload.wrap(model, None, host_memory="32KiB", disk=tmp_path, weight_dtype="int4")
    with pytest.raises(offload.OffloadError, match="no linear layers"):
        offload.wrap(nn.Embedding(9, 64), None, host_memory="1GiB", weight_dtype="int4")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Adapted(nn.Module):
    """A frozen layer and a trained low-rank one beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(128, 4, bias=False), nn.Linear(4, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.relu(self.base(x) + self.up(self.down(x)))
        return y


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Adapted(nn.Linear(128, 128).requires_grad_(False)) for _ in range(6)))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(4):
        loss = model(torch.randn(8, 128, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("device", [None, "emulated"])
def test_adapters_train_beside_streamed_codes(device: str | None, tmp_path: Path) -> None:
    runs = []
    for disk in (None, tmp_path):
        model = adapted()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        options: dict[str, Any] = {"host_memory": "1GiB"} if disk is None else {
            "host_memory": "270KiB", "disk": disk, "tuning": framed_tuning(chunk_bytes=4 * KIB),
            "device": device, "device_memory": "120KiB" if device else None,
        }  # fmt: skip
        offload.wrap(model, optimizer, weight_dtype="int4", **options)
        layers = [m for m in model.modules() if isinstance(m, Quantised)]
        assert len(layers) == 6, "adapters are trained and stay as they are"
        with offload.runtime(model) as run:
            runs.append((trained(model, optimizer), copy.deepcopy(model.state_dict())))
            assert disk is None or run.parts.engine.counters.evictions > 20
    (losses, weights), (losses_too, weights_too) = runs
    assert losses == losses_too
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, weights_too[k]) for k, v in weights.items())


def test_scratch_is_one_block_whatever_the_weight() -> None:
    model = nn.Linear(1024, 4096, bias=False)
    form: Format = FORMATS["int4"]
    assert scratch_bytes(model) == 0
    quantised(model, form.name)
    assert BLOCK_ELEMENTS < scratch_bytes(model) < 8 * BLOCK_ELEMENTS
