"""Parts of a model that are called by themselves are passes in frames, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.framed import Watched, adamw, tuning
from tests.test_throughput_encoded import build

PROMPT = torch.tensor([[5, 9, 11, 7, 3, 8]])


def wrapped(name: str, folder: Path, **options: Any) -> tuple[Any, Watched]:
    model = build(name)
    how = tuning(residents=options.pop("residents", False))
    return model, Watched(model, folder, memory="1MiB", host="2MiB", how=how, **options)


@pytest.mark.parametrize("residents", [False, True])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_by_itself_is_computed_like_the_rest(
    name: str, residents: bool, tmp_path: Path
) -> None:
    """Where the rest is, and in its type: on the emulated device only the type can tell."""
    plain = build(name).bfloat16()
    model, watched = wrapped(name, tmp_path, compute_dtype=torch.bfloat16, residents=residents)
    with torch.no_grad():
        for _ in range(3):
            found = model.get_encoder()(input_ids=PROMPT).last_hidden_state
            expected = plain.get_encoder()(input_ids=PROMPT).last_hidden_state
            assert found.dtype is torch.bfloat16
            assert torch.equal(found, expected)
    forms = watched.device.steps.forms
    assert [form.partition(" prefill")[0].rpartition(".")[2] for form in forms] == ["encoder"]
    held = watched.runtime.stats()["tiers"]["device"]["resident_bytes"]
    assert (held > 0) is residents
    watched.close()


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_generate_calls_the_encoder(name: str, tmp_path: Path) -> None:
    told = {"max_new_tokens": 4, "do_sample": False}
    expected = build(name).bfloat16().generate(PROMPT, **told)
    model, watched = wrapped(name, tmp_path, compute_dtype=torch.bfloat16)
    assert torch.equal(model.generate(PROMPT, **told), expected)
    watched.close()


def test_a_part_can_be_trained(tmp_path: Path) -> None:
    def train(model: Any, optimizer: Any) -> list[Tensor]:
        losses = []
        for step in range(4):
            hidden = model.get_encoder()(input_ids=PROMPT + step).last_hidden_state
            loss = (
                hidden.square().mean()
                + model(encoder_outputs=(hidden,), decoder_input_ids=PROMPT[:, :2])
                .logits.square()
                .mean()
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return losses

    plain, model = build("t5"), build("t5")
    expected = train(plain, adamw(plain))
    optimizer = adamw(model)
    watched = Watched(model, tmp_path, optimizer, memory="1MiB", host="2MiB")
    assert train(model, optimizer) == expected
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert watched.device.engine.ledger.other_bytes == 0
    watched.close()


def test_a_part_within_the_model_is_no_pass_of_its_own(tmp_path: Path) -> None:
    model, watched = wrapped("t5", tmp_path)
    with torch.no_grad():
        model(input_ids=PROMPT, decoder_input_ids=PROMPT)
    assert all(form.startswith("prefill") for form in watched.device.steps.forms)
    watched.close()
