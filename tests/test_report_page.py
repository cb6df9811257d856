"""The report in a browser: nothing fails, all is drawn, and hover, zoom, sort and filter work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("bokeh", reason="the report needs the extra `report`")
pytest.importorskip("playwright", reason="playwright is not installed")

from playwright.sync_api import (
    Browser,
    ConsoleMessage,
    Dialog,
    Page,
    Request,
    sync_playwright,
)

from offload.report_html import render, render_comparison
from tests.report_data import SMALL, made

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "</script><script>alert(1)//<img src=x onerror=alert(2)>"
WEIGHTS = {"light": (31, 119, 180), "dark": (79, 159, 219)}
ACCENT = {"light": (74, 69, 216), "dark": (167, 163, 255)}
PHASE = {"light": (227, 230, 236), "dark": (43, 48, 59)}
STALL = {"light": (211, 38, 26), "dark": (255, 90, 74)}

# Where a point of a chart is on the screen.
LOCATE = """async ([chart, x, y]) => {
  const plot = Bokeh.documents[0].roots().find((p) => p.name === chart);
  const element = document.getElementById("chart-" + chart);
  element.scrollIntoView({ block: "center", behavior: "instant" });
  for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);  // scrolling hides the tip
  const frame = Bokeh.index.get_by_id(plot.id).frame.bbox;
  const at = (range, value) => (value - range.start) / (range.end - range.start);
  const { left, top } = element.getBoundingClientRect();
  const across = left + frame.left + at(plot.x_range, x) * frame.width;
  return [across, top + frame.bottom - at(plot.y_range, y) * frame.height];
}"""
COUNT = """(canvases, colour) => {
  let found = 0;
  for (const canvas of canvases) {
    const copy = new OffscreenCanvas(canvas.width, canvas.height);
    const context = copy.getContext("2d", { willReadFrequently: true });
    context.drawImage(canvas, 0, 0);
    const { data } = context.getImageData(0, 0, copy.width, copy.height);
    for (let i = 0; i < data.length; i += 4) {
      found += data[i + 3] > 0 && colour.every((c, k) => Math.abs(c - data[i + k]) < 9);
    }
  }
  return found;
}"""
SHOWN = """(chart) => {
  const { start, end } = Bokeh.documents[0].roots().find((p) => p.name === chart).x_range;
  return [start, end];
}"""

Scheme = Literal["light", "dark"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium, as the system has it."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--disable-gpu"])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, and all that went wrong on it."""

    page: Page
    wrong: list[str] = field(default_factory=list)

    def watch(self) -> None:
        """Note errors, warnings, dialogs, and requests for anything but the file."""

        def on_dialog(dialog: Dialog) -> None:
            self.wrong.append("a dialog")
            dialog.dismiss()

        def on_console(message: ConsoleMessage) -> None:
            if message.type in ("error", "warning"):
                self.wrong.append(f"{message.type}: {message.text}")

        def on_request(request: Request) -> None:
            if not request.url.startswith("file:"):
                self.wrong.append(request.url)

        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("dialog", on_dialog)
        self.page.on("console", on_console)
        self.page.on("request", on_request)

    def point(self, chart: str, x: float, y: float) -> tuple[float, float]:
        """Pixels of a value; the chart is scrolled to the middle of the window."""
        across, down = self.page.evaluate(LOCATE, [chart, x, y])
        return across, down

    def hover(self, chart: str, x: float, y: float) -> str:
        """What is shown when the pointer is at a value."""
        self.page.mouse.move(*self.point(chart, x, y))
        self.page.wait_for_selector("#tip:not([hidden])")
        return self.page.locator("#tip").inner_text()

    def shown(self, chart: str) -> list[float]:
        """The seconds that a chart shows."""
        found: list[float] = self.page.evaluate(SHOWN, chart)
        return found

    def sees(self, chart: str, colour: tuple[int, int, int]) -> bool:
        """Whether a colour, give or take a little, is drawn in a chart."""
        canvases = self.page.locator(f"#{chart} canvas")
        return bool(canvases.evaluate_all(COUNT, list(colour)) > 30)

    def rows(self) -> list[str]:
        """The names in the table of modules."""
        return self.page.locator("#modules-table tbody th").all_inner_texts()


Opener = Callable[..., Opened]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages that the tests open."""
    folder = tmp_path_factory.mktemp("pages")
    slow = made(replace(SMALL, hostile=HOSTILE))
    fast = made(replace(SMALL, read_bytes_per_s=2.8e9, device="H200"))
    (folder / "one.html").write_text(render(slow), encoding="utf-8")
    (folder / "two.html").write_text(render_comparison(slow, fast), encoding="utf-8")
    (folder / "short.html").write_text(render(slow | {"step": None}), encoding="utf-8")
    return folder


@pytest.fixture
def opened(browser: Browser, files: Path) -> Iterator[Opener]:
    """Opens a page; at the end nothing may have gone wrong on any."""
    pages: list[Opened] = []

    def open_page(name: str = "one", width: int = 1280, scheme: Scheme = "light") -> Opened:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        it = Opened(page)
        pages.append(it)
        it.watch()
        page.set_default_timeout(15_000)
        page.goto((files / f"{name}.html").as_uri())
        page.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)
        return it

    yield open_page
    for it in pages:
        it.page.close()
        assert it.wrong == []


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("one", 1280, "light"), ("one", 400, "dark"), ("two", 1280, "dark"), ("two", 400, "light")],
)
def test_every_chart_is_drawn_and_nothing_sticks_out(
    opened: Opener, name: str, width: int, scheme: Scheme
) -> None:
    it = opened(name, width, scheme)
    charts = [c.get_attribute("id") or "" for c in it.page.locator(".chart").all()]
    assert len(charts) == {"one": 5, "two": 8}[name]
    # In a narrow window spans of transfers are thinner than a pixel, unlike the phases.
    for chart in charts:
        colours = ACCENT if "history" in chart else PHASE if "lanes" in chart else WEIGHTS
        assert it.sees(chart, colours[scheme]), chart
    red = it.page.locator(".split .k-stall").first
    assert red.evaluate("e => getComputedStyle(e).backgroundColor") == f"rgb{STALL[scheme]}"
    assert it.page.evaluate("document.documentElement.scrollWidth") == width
    ground = it.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(14, 16, 20)") == (scheme == "dark")


def test_hovering_tells_what_moves_how_fast_and_who_waits(opened: Opener) -> None:
    it, data = opened(), made(replace(SMALL, hostile=HOSTILE))
    stalls, read = data["step"]["stalls"], data["step"]["lanes"]["read"]["spans"]
    i = 5
    chunk, waiter = stalls["chunk"][i], data["modules"][stalls["module"][i]]["name"]
    spans = enumerate(zip(read["chunk"], read["start_s"], strict=True))
    span = max(k for k, (c, start_s) in spans if c == chunk and start_s < stalls["end_s"][i])
    middle = (read["start_s"][span] + read["end_s"][span]) / 2
    text = it.hover("lanes", middle, 1.5)
    waited_s = stalls["end_s"][i] - stalls["start_s"][i]
    for words in (
        "Read from disk", f"{chunk} (weights)", data["chunks"]["tensors"][chunk][0], "16.0 MiB",
        "1.77 GiB/s", f"for {(read['end_s'][span] - read['start_s'][span]) * 1e3:.1f} ms",
        f"{waiter}, {waited_s * 1e3:.1f} ms",
    ):  # fmt: skip
        assert words in text, f"{words!r} is not in {text!r}"

    text = it.hover("lanes", (stalls["start_s"][0] + stalls["end_s"][0]) / 2, 3.5)
    assert "Stall: waiting for reads from disk" in text
    assert "0 (weights)" in text
    assert f"{HOSTILE}.weight" in text, "a hostile name is shown as it is"
    assert "forward" in it.hover("lanes", 0.4, 4.5)
    it.page.mouse.move(5, 5)
    it.page.wait_for_selector("#tip", state="hidden")


def test_hovering_memory_adds_up(opened: Opener) -> None:
    it, memory = opened(), made()["step"]["memory"]["host"]
    at = 100
    text = it.hover("memory-host", (memory["t_s"][at] + memory["t_s"][at + 1]) / 2, 0.1)
    for kind in ("weights", "activations", "staging"):
        assert f"{memory['kinds'][kind][at] / 2**20:.1f} MiB" in text
    share = memory["used_bytes"][at] / memory["budget_bytes"]
    assert f"{memory['used_bytes'][at] / 2**30:.2f} GiB, {share:.0%} of the budget" in text
    assert "Step 7" in it.hover("history-step_s", 7.1, 1.0)


def test_zooming_one_chart_zooms_all_of_the_step(opened: Opener) -> None:
    it, memory, lanes = opened("two"), "a-memory-host", "b-lanes"
    whole = it.shown(lanes)
    across, down = it.point(memory, 0.5, 0.5)
    beyond, _ = it.point(memory, 0.75, 0.5)
    it.page.mouse.move(across, down)
    it.page.mouse.down()
    it.page.mouse.move(beyond, down, steps=4)
    it.page.mouse.up()
    assert it.shown(lanes) == it.shown(memory) == pytest.approx([0.5, 0.75], abs=0.01)
    said = it.page.locator("#lanes output").inner_text()
    assert re.fullmatch(r"0\.(49|50)\d* s to 0\.7[45]\d* s", said), said
    it.page.click("#memory [data-zoom=later]")
    assert it.shown(lanes) == pytest.approx([0.625, 0.875], abs=0.02)
    it.page.click("#memory [data-zoom=in]")
    it.page.click("#memory [data-zoom=reset]")
    assert it.shown(memory) == whole
    assert it.page.locator("#lanes output").inner_text() == "The whole step"


def test_a_stall_of_the_list_is_shown_in_the_timeline(opened: Opener) -> None:
    it, stalls = opened(), made()["step"]["stalls"]
    took = [b - a for a, b in zip(stalls["start_s"], stalls["end_s"], strict=True)]
    second = sorted(range(len(took)), key=lambda i: -took[i])[1]
    it.page.locator("[data-from]").nth(1).click()
    start_s, end_s = it.shown("lanes")
    assert start_s < stalls["start_s"][second] < stalls["end_s"][second] < end_s
    assert end_s - start_s == pytest.approx(5 * took[second], rel=0.01)


def test_modules_are_sorted_and_filtered(opened: Opener) -> None:
    it, data = opened(), made(replace(SMALL, hostile=HOSTILE))
    heads = it.page.locator("#modules-table thead th")
    stalled = sorted(data["modules"], key=lambda m: -m["stall_s"])
    assert it.rows()[:3] == [m["name"] for m in stalled[:3]]
    assert heads.nth(4).get_attribute("aria-sort") == "descending"
    heads.nth(3).locator("button").focus()
    it.page.keyboard.press("Enter")
    most = max(m["compute_s"] for m in data["modules"])
    computing = {m["name"]: m["compute_s"] for m in data["modules"]}
    assert computing[it.rows()[0]] == pytest.approx(most)
    assert heads.nth(4).get_attribute("aria-sort") is None
    heads.nth(0).locator("button").click()
    it.page.fill("#modules-table input[type=search]", "layers MLP.up")
    assert it.rows() == [f"model.layers.{i}.mlp.up_proj" for i in range(12)], "numbers as numbers"
    assert "12 of 86 modules" in it.page.locator("#modules-table [role=status]").inner_text()
    heads.nth(0).locator("button").click()
    assert it.rows()[0] == "model.layers.11.mlp.up_proj"
    it.page.check("#modules-table input[type=checkbox]")
    waited = [m for m in data["modules"] if m["stall_s"] > 0 and "mlp.up" in m["name"]]
    assert len(it.rows()) == len(waited) < 12
    it.page.fill("#modules-table input[type=search]", "no such module")
    assert it.rows() == []


def test_more_rows_come_when_asked_for(opened: Opener) -> None:
    it = opened("two")
    assert len(it.rows()) == 15
    it.page.click("#modules-table .more")
    it.page.click("#modules-table .more")
    assert len(it.rows()) == 87, "those of both runs: one is called otherwise in A"
    assert it.page.locator("#modules-table .more").is_hidden()


def test_the_theme_follows_the_button_and_the_charts_follow_it(opened: Opener) -> None:
    it, charts = opened("one", 1280, "dark"), ("chart-memory-host", "chart-lanes")
    assert it.page.locator("#theme").inner_text() == "Light"
    it.page.click("#theme")
    assert it.page.locator("#theme").get_attribute("aria-label") == "Switch to the dark theme"
    it.page.wait_for_timeout(100)
    assert all(it.sees(chart, WEIGHTS["light"]) for chart in charts)
    assert not any(it.sees(chart, WEIGHTS["dark"]) for chart in charts)
    it.page.click("#theme")
    it.page.wait_for_timeout(100)
    assert all(it.sees(chart, WEIGHTS["dark"]) for chart in charts)


def test_a_page_without_a_step_opens(opened: Opener) -> None:
    it = opened("short")
    assert it.page.locator(".zoom").count() == 0
    assert it.page.locator(".chart").count() == 3
