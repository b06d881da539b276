#!/usr/bin/env python
"""Take the screenshots of docs/report-page.md: a report at 390 and 1280 pixels, light and dark.

    scripts/screenshots.py                       an example with every part, from tests/report/test_page.py
    scripts/screenshots.py RUN/report.html       another page

Needs Chromium on PATH. Its window is at least 500 pixels wide, so the page is in a frame of the right width.
"""

from __future__ import annotations

import argparse
import copy
import html
import importlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
VIEWS = {390: (4, 1190), 1280: (1, 1960)}
"""For each width of the page: the columns into which the picture is cut, and their height in pixels."""


def example(folder: Path) -> Path:
    """Write a page with forced choices, subgroups, three jobs and a test set that was used before."""
    sys.path[:0] = [str(ROOT / "tests" / "report"), str(ROOT / "tests")]
    made = importlib.import_module("test_page")
    run = made.write(folder / "run", n=200, jobs=3, epochs=2)
    run["evaluation"]["subgroups"] = copy.deepcopy(made.SUBGROUPS)
    reuse = {"test_set": "0" * 16, "number": 15, "models": 15, "rows": 200, "alpha": 0.05, "chance": 0.18}
    run["evaluation"]["reuse"] = {**reuse, "corrected": False}
    shutil.copy(DOCS / "demo-loss.png", folder / "run" / "loss.png")
    made.save(folder / "run", run)
    page = folder / "report.html"
    page.write_text(made.rendered(folder / "run"), encoding="utf-8")
    return page


def screenshot(page: Path, width: int, theme: str, folder: Path) -> Image.Image:
    """Take a picture of the page from its top."""
    columns, height = VIEWS[width]
    frame = (
        f'<iframe width="{width}" height="{columns * height}" src="{html.escape(page.resolve().as_uri())}"></iframe>'
    )
    outer, picture = folder / "frame.html", folder / "picture.png"
    outer.write_text(f"<!doctype html><style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>{frame}", "utf-8")
    options = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"),
        f"--blink-settings=preferredColorScheme={'0' if theme == 'dark' else '1'}",
        *(f"--window-size={max(500, width)},{columns * height}", f"--screenshot={picture}"),
    ]
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("chromium is not on PATH: apt install chromium")
    subprocess.run([browser, *options, outer.as_uri()], check=True, capture_output=True, timeout=120)
    whole, gap = Image.open(picture).convert("RGB"), 30
    cut = Image.new("RGB", (columns * width + (columns - 1) * gap, height), "gray")
    for number in range(columns):
        part = whole.crop((0, number * height, width, (number + 1) * height))
        cut.paste(part, (number * (width + gap), 0))
    return cut


def main() -> None:
    """Write the four pictures into docs/."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path, nargs="?")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        page = parser.parse_args().page or example(folder)
        for width in VIEWS:
            for theme in ("light", "dark"):
                path = DOCS / f"report-{width}-{theme}.png"
                screenshot(page, width, theme, folder).quantize(64).save(path, optimize=True)
                print(path, f"{path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
