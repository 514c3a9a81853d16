"""Every Python block of the documentation runs."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

import ensemble_attacks
from ensemble_attacks.evaluation.settings import Sweep

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    assert bool(blocks) == bool(capsys.readouterr().out)


def test_the_site_has_every_page_and_every_public_name() -> None:
    """Both would be missed in silence; broken links are the site's own errors (`make docs`)."""
    docs, nav = ROOT / "docs", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*") if path.suffix in (".md", ".ipynb")]
    assert not [page for page in pages if f": {page}\n" not in nav]
    api = "".join(path.read_text() for path in (docs / "api").glob("*.md"))
    assert not [name for name in ensemble_attacks.__all__ if f"::: ensemble_attacks.{name}\n" not in api]


@pytest.mark.parametrize("page", [*PAGES, README], ids=lambda page: page.stem)
def test_configurations_are_read(page: Path) -> None:
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        content = tomllib.loads(block)
        if "models" in content:
            assert Sweep.of(content, str(page)).attacks


def code_cells() -> list[str]:
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    return ["".join(cell["source"]) for cell in cells]


def test_the_tutorial_is_a_notebook() -> None:
    for number, code in enumerate(code_cells()):
        compile(code, f"cell {number}", "exec")


@pytest.mark.slow
def test_the_tutorial_runs(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for number, code in enumerate(code_cells()):
        exec(compile(code, f"cell {number}", "exec"), namespace)
    assert "parts of the run bear it out" in capsys.readouterr().out


@pytest.mark.slow
def test_the_readme_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten lines print the table that stands below them, but for the seconds."""
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, str(README), "exec"), {})
    below = text.partition(code)[2].partition("The same call")[0]
    printed, shown = (
        [[cell.strip() for cell in line.split("|")[1:-2]] for line in found.splitlines() if line.startswith("|")]
        for found in (capsys.readouterr().out, below)
    )
    assert printed[2:] == shown[2:]


def test_the_front_page_is_short_and_its_links_exist() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    for page in (README, *PAGES):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
