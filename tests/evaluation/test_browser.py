"""The pages in a real headless browser, where one is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import leaderboard
from ensemble_attacks.evaluation.report.pages import render_page

BROWSER = next((found for name in ("chromium", "google-chrome", "chromium-browser") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")

CLICK = "<script>document.querySelectorAll('th button')[{column}].click()</script></body>"


def look(page: Path, *arguments: str) -> str:
    """What the browser prints of a page."""
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    command += ["--virtual-time-budget=2000", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture
def page(tmp_path: Path) -> Path:
    template = Path(leaderboard.__file__).with_name("leaderboard.html.jinja")
    rows = [["b", 10.5, ""], ["<b>a</b>", 9.0, "x"], ["c", 100.0, "y"]]
    path = tmp_path / "page.html"
    path.write_text(
        render_page(template, title="A title", rules="Rules.", columns=["model", "robust %", "flags"], rows=rows)
    )
    return path


@pytest.mark.parametrize(
    ("column", "expected"), [(0, ["<b>a</b>", "b", "c"]), (1, ["<b>a</b>", "b", "c"]), (2, ["<b>a</b>", "c", "b"])]
)
def test_a_click_sorts_the_table(column: int, expected: list[str], page: Path) -> None:
    page.write_text(page.read_text().replace("</body>", CLICK.format(column=column)))
    shown = look(page, "--dump-dom")
    names = re.findall(r"<tr><td>(.*?)</td>", shown.partition("<script")[0])  # what is empty comes last
    assert names == [name.replace("<", "&lt;").replace(">", "&gt;") for name in expected]


def test_nothing_is_cut_off(page: Path) -> None:
    columns = ["dataset", "defense", "vote", "eps", "n", "clean", "AutoAttack", "best known", "low", "high", "found by"]
    columns += ["passes / image", "auto", "auto's passes", "flags", "weights", "images"]
    row = ["digits", "multiresolution_at_convnet_1", "own", 0.1, *[100.0] * 6, "crossmax-transfer", 1909.8, 72.0, 1234.5]
    row += ["aggregation, random, zero_gradients, transfer_gap, unstable_predictions", "0123456789ab", "0123456789ab"]
    template = Path(leaderboard.__file__).with_name("leaderboard.html.jinja")
    page.write_text(render_page(template, title="A title", rules=leaderboard.RULES, columns=columns, rows=[row]))
    beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    page.write_text(page.read_text().replace("</body>", f"<script>document.title = {beyond}</script></body>"))
    assert "<title>0</title>" in look(page, "--dump-dom", "--window-size=1100,800")
    look(page, "--window-size=1100,800", f"--screenshot={page.with_suffix('.png')}")
    with Image.open(page.with_suffix(".png")) as image:
        assert image.size == (1100, 800)
        colours = image.convert("L").getcolors()
        assert colours is not None
        assert len(colours) > 10  # something is drawn
