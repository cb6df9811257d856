"""The table of machines, the roofline, and rates measured on a small run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload.blueprint import FineTune
from offload.effort import Taken, as_dict, compare, processor_of, sample_for
from offload.errors import OffloadError
from offload.machines import (
    DTYPES,
    Effort,
    Processor,
    known_machines,
    rates_of,
    read_machine,
    site_of,
)
from offload.prefetch.trace import Access, Moment, Need, Phase, Trace
from tests.test_synthesis import llama


@pytest.mark.parametrize("name", known_machines())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_figure_of_the_table_has_a_source(name: str, dtype: str) -> None:
    entry = known_machines()[name]
    figures = {k for k in entry if k.endswith("_per_s") and not k.startswith("disk")} | {"disk"}
    assert set(entry["sources"]) == figures
    site = site_of(name, entry, dtype)
    assert site.machine.read_bytes_per_s < entry["disk_read_bytes_per_s"]
    assert site.machine.mixed_read_bytes_per_s <= site.machine.read_bytes_per_s
    assert site.processor.flops_per_s == pytest.approx(entry["flops_per_s"][dtype] / 2)
    assert (site.device_bytes is None) == (site.machine.h2d_bytes_per_s == 0)
    assert site.endurance_bytes == entry["disk_endurance_bytes"]
    rates = rates_of(site, 2)
    assert (rates.device is None) == (site.device_bytes is None)
    assert rates.host.weight_s(1) <= rates.host.weight_s(512)


def test_a_file_may_give_its_own_shares(tmp_path: Path) -> None:
    entry = known_machines()["laptop-32gb-gen4"] | {"attained": {"flops": 1.0}}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(entry))
    site = site_of(str(file), read_machine(str(file)), "float32")
    assert site.processor.flops_per_s == entry["flops_per_s"]["float32"]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"flops_per_s": {"float16": 1e12}}, "'float32'"),
    ({"host_memory": "much"}, "not a size"),
    ({"disk_read_bytes_per_s": 0}, "not positive"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=lambda x: str(x)[:20])
def test_machines_that_make_no_sense_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(OffloadError, match=words):
        site_of("odd", known_machines()["laptop-32gb-gen4"] | change, "float32")


def test_unknown_machines_are_refused_with_those_that_are_known(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="rtx4090-64gb-gen4"):
        read_machine("rtx9999")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(OffloadError, match="JSON object"):
        read_machine(str(tmp_path / "list.json"))


def a_trace(times: float) -> Trace:
    """Two moments of each phase, of 10 bytes."""
    phases = (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE)
    moments = [Moment(p, (Need(0, Access.READ),), times * (1 + i), 0, times * 0.1)
               for i, p in enumerate(phases) for _ in range(2)]  # fmt: skip
    return Trace(tuple(moments), (10,), {})


def test_factors_are_medians_of_what_steps_took_over_the_roofline() -> None:
    taken = [Taken(a_trace(f), b) for f, b in ((2.0, 1.1), (3.0, 1.0), (30.0, 2.0))]
    effort = compare(a_trace(1.0), taken)
    assert effort.factor == pytest.approx(dict.fromkeys(effort.factor, 3.0))
    assert effort.handling_s_per_byte[Phase.UPDATE] == pytest.approx(0.3 / 10)
    assert effort.beyond == 1.1
    processor = Processor(100.0, 10.0, 5.0, effort)
    assert processor.work_s(Phase.FORWARD, [(200.0, 1.0), (1.0, 10.0)]) == pytest.approx(9.0)
    assert processor.update_s(Phase.UPDATE, 10) == pytest.approx(6.0)
    assert processor_of(json.loads(json.dumps(as_dict(processor)))) == processor
    assert Processor(100.0, 10.0, 5.0).effort == Effort()


def test_samples_are_small_and_like_the_model() -> None:
    job = FineTune(batch=64, sequence=2048)
    large = llama()
    large.update({"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126})
    sample = sample_for(large, job, 64 << 20, 0.237)
    assert (sample.hidden, sample.intermediate) == (1024, 3328)
    assert 2 <= sample.layers <= 3
    assert sample.share == 0.25
    assert sample.job.batch * sample.job.sequence <= 4096
    assert sample.config().num_hidden_layers == sample.layers
    small = sample_for(llama(), job, 64 << 20, 7.0)
    assert (small.hidden, small.layers, small.share) == (64, 3, 1.0)
