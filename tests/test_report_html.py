"""The report as a file: its size, what it says, and that names in it are only names."""

from __future__ import annotations

import copy
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from offload.errors import OffloadError

pytest.importorskip("bokeh", reason="the report needs the extra `report`")

from offload.report_charts import MOST_SAMPLES, Charts, history_chart, memory_chart
from offload.report_html import render, render_comparison
from offload.report_view import forecast_rows
from tests.report_data import GIB, HUNDRED_B, SMALL, made

HOSTILE = "</script><script>alert(1)//<img src=x onerror=alert(2)>{{ 7*7 }}"
MOST_BYTES = 8_000_000


class _Page(HTMLParser):
    """Scripts, visible text and everything that a browser would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.loads: list[str] = []
        self._open: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open = tag
        given = dict(attrs)
        if tag == "script":
            self.scripts.append((given, ""))
        self.loads += [v or "" for k, v in attrs if k in ("src", "srcset", "data") or tag == "link"]

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._open != "style":
            self.text += data + " "


@pytest.fixture(scope="module")
def html() -> str:
    """The report of a small run."""
    return render(made())


@pytest.fixture(scope="module")
def hundred_b() -> dict[str, Any]:
    """The data of a run of 100 B parameters."""
    return made(HUNDRED_B)


def _data_in(html: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        next(text for given, text in _Page(html).scripts if given.get("id") == "page-data")
    )
    return data


def test_one_file_says_the_verdict_the_figures_and_the_machine(html: str) -> None:
    data, page = made(), _Page(html)
    assert page.loads == [], "the page would load something"
    for words in (
        data["verdict"]["text"], *data["verdict"]["advice"], "LlamaForCausalLM", "1.10×",
        "2.50 s", "of 2.00 GiB host memory (98%)", "Bandwidth while busy", "1.77 GiB/s",
        "Predicted", "+43%", "2.13.0", "16 cores",
    ):  # fmt: skip
        assert words in page.text, words


def test_a_hundred_billion_parameters_stay_under_eight_megabytes(
    hundred_b: dict[str, Any],
) -> None:
    data = hundred_b
    assert data["model"]["parameters"] > 1e11
    spans = sum(len(lane["spans"]["chunk"]) for lane in data["step"]["lanes"].values())
    assert spans > 20_000
    assert len(render(data).encode()) < MOST_BYTES


def test_hostile_names_are_only_names() -> None:
    size = replace(SMALL, name=HOSTILE, hostile=HOSTILE)
    for html in (render(made(size)), render_comparison(made(size), made())):
        page = _Page(html)
        assert len(page.scripts) == 3, "a name has opened a script"
        assert "<img" not in html
        assert HOSTILE in page.text
        assert HOSTILE in _data_in(html)["table"]["rows"]["name"]


def test_only_the_pages_own_scripts_may_run(html: str) -> None:
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert found is not None
    policy = found[1].replace("&#39;", "'")
    assert "default-src 'none'" in policy
    scripts = re.search(r"script-src ([^;]*)", policy)
    assert scripts is not None
    assert [source[:8] for source in scripts[1].split()] == ["'sha256-"] * 2


def test_what_hovering_looks_up_is_whole(html: str) -> None:
    data, run = made(), _data_in(html)["runs"][""]
    names = [[run["names"][i] for i in chunk] for chunk in run["tensors"]]
    assert names == data["chunks"]["tensors"]
    assert run["stalls"] == data["step"]["stalls"]
    assert run["modules"] == [m["name"] for m in data["modules"]]


def test_without_a_recorded_step_the_rest_is_there() -> None:
    data = made() | {"step": None, "forecast": None}
    page = _Page(render(data))
    assert "No step was recorded" in page.text
    assert "Over the run" in page.text
    assert "Who worked" not in page.text
    assert "No step was recorded" in _Page(render_comparison(data, made())).text


def test_a_run_that_knows_little_is_shown() -> None:
    data = made()
    data["history"] = {"step": [], "loss": [], "step_s": [], "tokens_per_s": []}
    data["step"]["stalls"] = {k: [] for k in data["step"]["stalls"]}
    data["step"]["memory"]["host"]["budget_bytes"] = None
    data["budgets"] = {"device": None, "host": None, "disk": None}
    page = _Page(render(data))
    assert "Nothing is known of the run's other steps." in page.text
    assert "None: all transfers were hidden" in page.text
    assert "no budget was set" in page.text


def test_two_runs_are_named_and_the_faster_is_said() -> None:
    faster = made(replace(SMALL, read_bytes_per_s=2.8e9))
    compared = render_comparison(made(), faster)
    page = _Page(compared)
    assert "B is 1.47 times as fast: a step takes 2.50 s in A and 1.70 s in B." in page.text
    assert "A is 1.47 times as fast" in _Page(render_comparison(faster, made())).text
    assert "−32%" in page.text
    rows = _data_in(compared)["table"]["rows"]
    assert sum(rows["stall_sA"]) > sum(rows["stall_sB"]) > 0


def test_thinning_keeps_the_peak(hundred_b: dict[str, Any]) -> None:
    data = hundred_b
    memory = copy.deepcopy(data["step"]["memory"]["host"])
    peak = memory["used_bytes"].index(max(memory["used_bytes"]))
    memory["kinds"]["staging"][peak] += 3 * GIB
    memory["used_bytes"][peak] += 3 * GIB
    clock = Charts().shared("clock", data["step"]["step_s"])
    plot = memory_chart(memory, data["step"], clock, 2.0 * max(memory["used_bytes"]))
    drawn = plot.renderers[0].data_source.data
    assert len(memory["t_s"]) > 2 * MOST_SAMPLES > len(drawn["t"])
    assert max(drawn["top-fixed"]) == pytest.approx(max(memory["used_bytes"]) / GIB)


def test_unknown_losses_are_left_out() -> None:
    plot = history_chart({"": ([1, 2, 3], [2.5, None, 1.5])}, "Loss", from_zero=False)
    assert plot is not None
    assert list(plot.renderers[0].data_source.data["y"]) == [2.5, 1.5]
    assert history_chart({"": ([1], [None])}, "Loss", from_zero=False) is None


def test_other_schemas_and_missing_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OffloadError, match=r"schema 2.*make the report with offload 0\.9"):
        render({"schema": 2, "offload": "0.9"})
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OffloadError, match=r"jinja2.*pip install 'offload\[report\]'"):
        render(made())


def test_what_was_not_foretold_at_all_is_not_called_equal() -> None:
    data = made()
    data["forecast"] |= {"stall_s": 0.0, "read_bytes": 0}
    data["measured"] |= {"stall_s": 0.01, "read_bytes": 0}
    rows = {row["key"]: (row["change"], row["far"]) for row in forecast_rows(data)}
    assert rows["stall_s"] == ("more", True)
    assert rows["read_bytes"] == ("equal", False)
