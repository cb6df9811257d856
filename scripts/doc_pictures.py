"""Make the pictures of docs/how-it-works.md from a report of a real run: docs/pictures/*.png.

A Llama of 24.7 M parameters (state 377 MiB) is trained for some steps within 128 MiB, and
generates rows, here and now; its reports are opened in the Chromium that the tests use. Needs the
extra ``report``, playwright and a Chromium (scripts/browser.sh). On a machine that does other
things as well the pictures show that. Usage: scripts/doc_pictures.py [FOLDER FOR SPILL FILES]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from transformers import LlamaConfig, LlamaForCausalLM

import offload
from offload.places import BlockPlan

PICTURES = Path(__file__).resolve().parent.parent / "docs" / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1120, 900
MOST_BYTES = 150 * 1024
BUDGET, STEPS, TOKENS = "128MiB", 12, 256
ROWS, NEW_TOKENS = 16, 24


def a_llama() -> LlamaForCausalLM:
    """The model of bench's shape 25m."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=384, intermediate_size=1088, num_hidden_layers=10,
            num_attention_heads=6, num_key_value_heads=6,
        )
    )  # fmt: skip


def train(disk: Path, page: Path) -> None:
    """Some steps from disk, on text that repeats itself, so that the loss falls."""
    model = a_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    offload.wrap(model, optimizer, host_memory=BUDGET, disk=disk)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 8192, (1, TOKENS), generator=generator)
    columns: dict[str, list[float | None]] = {"step": [], "loss": [], "step_s": []}
    for step in range(STEPS):
        began_s = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values = (step + 1, loss.item(), time.perf_counter() - began_s)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    columns["tokens_per_s"] = [TOKENS / s if s else None for s in columns["step_s"]]
    with offload.runtime(model) as run:
        run.report(page, history=columns)


def generate(disk: Path, page: Path) -> None:
    """Rows side by side; half of the weights fit beside their keys and values."""
    model = a_llama().eval()
    offload.wrap(model, None, host_memory="112MiB", disk=disk)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 8192, (40,), generator=generator) for _ in range(ROWS)]
    with offload.runtime(model) as run:
        run.generate(prompts, NEW_TOKENS, plan=BlockPlan(ROWS // 2, 2))
        run.report(page)


def shoot(page: Page, name: str, *selectors: str) -> None:
    """What these elements cover together, as one picture."""
    boxes = []
    for selector in selectors:
        box = page.locator(selector).first.bounding_box()
        assert box is not None, selector
        boxes.append(box)
    top = min(box["y"] for box in boxes)
    bottom = max(box["y"] + box["height"] for box in boxes)
    file = PICTURES / f"{name}.png"
    clip = {"x": 0, "y": top - 8, "width": WIDTH, "height": bottom - top + 16}
    page.screenshot(path=file, full_page=True, clip=clip)  # type: ignore[arg-type]
    if file.stat().st_size > MOST_BYTES:
        sys.exit(f"{file.name} has {file.stat().st_size >> 10} KiB: too much for a repository")
    print(f"{file.name}: {file.stat().st_size >> 10} KiB")


def main() -> None:
    browser_path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser_path is None:
        sys.exit("no Chromium (Debian: apt-get install chromium)")
    PICTURES.mkdir(exist_ok=True)
    where = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=where) as folder, sync_playwright() as playwright:
        files = [Path(folder) / f"{name}.html" for name in ("train", "generate")]
        train(Path(folder) / "spill", files[0])
        generate(Path(folder) / "spill", files[1])
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        for file in files:
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-ready]", state="attached", timeout=30_000)
            page.wait_for_timeout(500)
            if file is files[0]:
                shoot(page, "verdict", "div.verdict", ".advice")
                shoot(page, "memory", "figure:has(#chart-memory-host)")
                shoot(page, "timeline", "figure:has(#chart-lanes)")
                shoot(page, "forecast", "#forecast")
            else:
                shoot(page, "generate-memory", "figure:has(#chart-memory-host)")
        browser.close()


if __name__ == "__main__":
    main()
