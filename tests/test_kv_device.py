"""Keys and values of a model in frames: attention on the host, or history that is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import offload
from offload.blockcaches import KVAsked
from offload.errors import BudgetError, OffloadError
from offload.generateconfig import build_generate
from offload.kvdevice import DeviceTable
from offload.places import BlockPlan
from offload.settings import InputError
from offload.tiers.spec import KIB, MIB
from tests import fakecuda
from tests.caching import given
from tests.framed import Watched, tuning
from tests.test_kv import FAMILIES, MEMORY_KIB, PROMPT, ROWS, build, generate, same
from tests.test_throughput_kv import build as build_mha
from tests.test_throughput_kv import prompts


def wrapped(folder: Path, family: str = "llama", **options: Any) -> Watched:
    """A model in frames that are too small for it, its history on three tiers."""
    options = {"memory": "160KiB", "host": "700KiB"} | options
    return Watched(build(FAMILIES[family]), folder, **options)


def open_cache(watched: Watched, family: str = "llama", rows: int = 1, **how: Any) -> Any:
    memory = MEMORY_KIB[family] * KIB * rows
    return watched.runtime.kv_cache(**({"memory": memory, "block_tokens": 8} | how))


def told(watched: Watched) -> dict[str, Any]:
    """What the caches did on the device."""
    found: dict[str, Any] = watched.runtime.stats()["kv"]["device"]
    return found


def end(watched: Watched, cache: Any) -> None:
    """Close all, and see that what the cache had came back and that no budget was exceeded."""
    cache.close()
    host, device = watched.runtime.parts.engine.ledger, watched.device.engine.ledger
    assert host.other_bytes == device.other_bytes == told(watched)["held_bytes"] == 0
    assert device.peak_bytes <= device.budget_bytes
    assert host.peak_bytes <= host.budget_bytes
    watched.close()


@pytest.mark.parametrize(
    ("family", "attention", "beams"),
    [
        ("llama", "host", 1), ("llama", "device", 1), ("llama", "device", 3), ("gpt2", "host", 3),
        ("t5", "host", 1), ("t5", "device", 1), ("gemma2", "device", 1),
    ],
)  # fmt: skip
def test_same_tokens_as_plain_transformers(
    tmp_path: Path, family: str, attention: str, beams: int
) -> None:
    expected = generate(build(FAMILIES[family]), num_beams=beams)
    watched = wrapped(tmp_path, family, memory=f"{160 * beams}KiB")
    cache = open_cache(watched, family, beams, attention=attention)
    assert same(generate(watched.model, cache, num_beams=beams), expected)
    kv, device = cache.stats(), told(watched)
    assert kv["evicted_blocks"] > 10
    assert kv["read_bytes"] > 2 * kv["written_bytes"] > 0
    assert watched.device.engine.counters.evictions > 20
    assert (device["host_attentions"] > 50) == (attention == "host")
    if attention == "host" and family != "t5":  # which attends to its encoder, too
        assert device["held_bytes"] == 0, "device memory is for others then"
    if attention == "device":
        assert device["device_attentions"] > 50
        assert device["ahead_copies"] > 20
        assert device["copied_bytes"] > 5 * kv["written_bytes"]
    end(watched, cache)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_new_tokens(tmp_path: Path, family: str) -> None:
    """On the host, too, but where heads share keys: that would multiply keys and values there."""
    ids = torch.randint(1, 96, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    how: Any = {"max_new_tokens": 30, "do_sample": False, "prompt_lookup_num_tokens": 3}
    expected = build(FAMILIES[family]).generate(ids, **how)
    watched = wrapped(tmp_path, family)
    cache = open_cache(watched, family, attention="host")
    assert torch.equal(watched.model.generate(ids, **given(watched.model, cache), **how), expected)
    assert told(watched)["host_attentions"] > 20
    assert (told(watched)["device_attentions"] > 0) == (family == "llama")
    end(watched, cache)


def test_a_block_at_a_time(tmp_path: Path) -> None:
    """No room beside the block that is copied: none crosses ahead, and none twice in its turn."""
    expected = generate(build())
    watched = wrapped(tmp_path)
    cache = open_cache(watched, attention="device")
    table: Any = watched.runtime.parts.kv.beyond.table  # type: ignore[union-attr]
    table.room._ahead_bytes = 0
    assert same(generate(watched.model, cache), expected)
    copies = told(watched)["demand_copies"] + told(watched)["ahead_copies"]
    turns, blocks = told(watched)["device_attentions"], -(-(PROMPT + 40) // 8)
    assert turns < copies <= turns * blocks
    assert all(layer.history.tail.copy is None for layer in cache.layers)
    end(watched, cache)


def test_auto_tries_the_host_and_keeps_to_the_bits(tmp_path: Path) -> None:
    expected = generate(build())
    watched = wrapped(tmp_path, how=tuning(None))  # real lanes: their rates are known
    cache = open_cache(watched)
    assert same(generate(watched.model, cache), expected)
    device = told(watched)
    assert device["host_attentions"] >= 5
    assert device["device_attentions"] >= 5
    assert device["host_bytes_per_s"] > 0
    assert device["device_bytes_per_s"] > 0
    assert device["h2d_bytes_per_s"] > 0
    end(watched, cache)


def test_coded_blocks_are_decoded_where_they_are_attended_to(tmp_path: Path) -> None:
    results = []
    for attention in ("host", "device"):
        watched = wrapped(tmp_path / attention, host="1MiB", memory="240KiB")
        cache = open_cache(
            watched, memory=160 * KIB, block_tokens=32, kv_dtype="int4", attention=attention
        )
        results.append(generate(watched.model, cache, new=60))
        assert cache.stats()["key_error"] > 0
        end(watched, cache)
    assert same(*results)


# -- the model's own attention ---------------------------------------------------------------


def test_the_models_own_attention_comes_back(tmp_path: Path) -> None:
    watched = wrapped(tmp_path)
    model, names = watched.model, list[str]()
    layer = model.model.layers[1].self_attn
    layer.register_forward_hook(lambda *_: names.append(layer.config._attn_implementation))
    for attention in ("device", "host"):
        cache = open_cache(watched, attention=attention)
        generate(model, cache, new=4)
        assert set(names) == {"sdpa" if attention == "device" else "offload-sdpa"}
        names.clear()
        if attention == "device":
            cache.close()
            assert model.config._attn_implementation == "sdpa"
    watched.runtime.unwrap()  # with a cache that is open
    assert model.config._attn_implementation == "sdpa"
    assert layer.config._attn_implementation == "sdpa"
    generate(model, new=4)


def test_attention_of_the_users_own_is_left_alone_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AttentionInterface.register("mine", AttentionInterface()["sdpa"])
    watched = wrapped(tmp_path)
    watched.model.set_attn_implementation("mine")
    cache = open_cache(watched, attention="host")
    ids = torch.ones(ROWS, PROMPT, dtype=torch.long)
    with torch.no_grad():
        for _ in range(3):
            watched.model(ids[:, :1], **given(watched.model, cache))
    assert watched.model.config._attn_implementation == "mine"
    assert told(watched)["host_attentions"] == 0
    assert told(watched)["device_attentions"] == 2 * 4
    assert capsys.readouterr().err.count("its attention is 'mine', not one of 'sdpa'") == 1
    end(watched, cache)


def test_eager_with_shared_heads_stays_on_the_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = build()
    plain.set_attn_implementation("eager")
    expected = generate(plain, new=10)
    watched = wrapped(tmp_path)
    watched.model.set_attn_implementation("eager")
    cache = open_cache(watched, attention="host")
    assert same(generate(watched.model, cache, new=10), expected)
    assert told(watched)["host_attentions"] == 0
    assert capsys.readouterr().err.count("does not take them as a cache returns them") == 1
    end(watched, cache)


def test_settings_of_the_command() -> None:
    told = {"model": "m", "output": "o", "data.prompts": "p"}
    assert build_generate(told | {"cache.attention": "host"}).cache.attention == "host"
    with pytest.raises(InputError, match="auto, host, device, not gpu"):
        build_generate(told | {"cache.attention": "gpu"})
    with pytest.raises(ValueError, match="one of auto, host, device"):
        KVAsked(MIB, attention="gpu")


# -- budgets ---------------------------------------------------------------------------------


def test_a_device_that_is_too_small_for_a_layers_history_says_so(tmp_path: Path) -> None:
    rows, how = 24, dict[str, Any](memory=2 * MIB)
    expected = generate(build(), rows=rows)
    watched = wrapped(tmp_path, memory="160KiB", host="4MiB")
    with pytest.raises(OffloadError, match="one of auto, host, device"):
        open_cache(watched, attention="disk")
    cache = open_cache(watched, attention="device", **how)
    with pytest.raises(BudgetError, match="device tier: the KV cache needs") as refused:
        generate(watched.model, cache, rows=rows)
    assert refused.value.tier == "device"
    assert cache.get_seq_length() > PROMPT
    del refused  # its traceback has views
    cache.close()
    cache = open_cache(watched, attention="host", **how)  # its history needs no room there
    copied = told(watched)["copied_bytes"]
    assert same(generate(watched.model, cache, rows=rows), expected)
    assert told(watched)["copied_bytes"] == copied
    cache.close()
    cache = open_cache(watched, **how)  # "auto" copies until there is no room
    attended = told(watched)["host_attentions"]
    assert same(generate(watched.model, cache, rows=rows), expected)
    assert told(watched)["copied_bytes"] > copied
    assert told(watched)["host_attentions"] > attended + 8
    end(watched, cache)


@pytest.mark.parametrize("attention", ["host", "device"])
def test_blocks_of_rows(tmp_path: Path, attention: str) -> None:
    asked: Any = prompts(9)
    how: Any = {"plan": BlockPlan(3, 2), "kv_memory": 330 * KIB}
    plain = build_mha()
    offload.wrap(plain, host_memory="4MiB")
    wanted = offload.runtime(plain).generate(asked, 20, plan=BlockPlan(3, 2))
    watched = Watched(build_mha(), tmp_path, memory="300KiB", host="1MiB")
    rows = watched.runtime.generate(asked, 20, attention=attention, **how)
    assert [row.tokens for row in rows] == [row.tokens for row in wanted]
    device = told(watched)
    assert (device["host_attentions"] > 0) == (attention == "host")
    assert device["held_bytes"] == watched.device.engine.ledger.other_bytes == 0
    assert watched.device.engine.ledger.peak_bytes <= 300 * KIB
    assert watched.runtime.stats()["kv"]["evicted_blocks"] > 5
    assert watched.model.config._attn_implementation == "sdpa"
    watched.close()


# -- order on CUDA's streams -----------------------------------------------------------------


@pytest.mark.parametrize("broken", ["", "arrive", "vacant"])
def test_streams_wait_for_each_other(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fakecuda.install(monkeypatch)
    watched = wrapped(tmp_path, host="50MiB", memory="240KiB", how=tuning(None))
    cache = open_cache(watched, memory=MIB, attention="device")
    kv = watched.runtime.parts.kv.beyond.table  # type: ignore[union-attr]
    frames, take = set[int](), kv.room.arena.take
    if broken == "arrive":
        monkeypatch.setattr(kv._copier, "arrive", lambda mark: None)
    elif broken:
        monkeypatch.setattr(kv.room.arena.memory, "vacant", lambda address: None)

    def noted(size_bytes: int) -> Any:
        frame = take(size_bytes)
        frames.add(frame.address)
        return frame

    monkeypatch.setattr(kv.room.arena, "take", noted)
    generate(watched.model, cache, new=20)
    assert told(watched)["ahead_copies"] > 20
    assert len(frames & fake.written.keys()) > 2, "blocks were copied by the copier of the weights"
    assert bool(fake.races) == bool(broken)
    cache.close()
    watched.close()


def test_copies_on_the_device_are_asked_for_where_it_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(DeviceTable, "relieve", lambda _, desperate: asked.append(desperate))
    watched = wrapped(tmp_path)
    open_cache(watched, attention="device")
    watched.device.engine.tenants.relieve(True)
    assert asked == [True]
    watched.runtime.parts.engine.tenants.relieve(True)
    assert asked == [True], "the host's engine asks those who have the host's memory"
    watched.close()
