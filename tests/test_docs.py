"""Every Python block of the documentation runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pdoc
import pytest

import ensemble_attacks
from ensemble_attacks.evaluation.settings import Sweep

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    assert bool(blocks) == bool(capsys.readouterr().out)


def test_the_api_reference_has_every_public_name(tmp_path: Path) -> None:
    assert all(hasattr(ensemble_attacks, name) for name in ensemble_attacks.__all__)  # they are imported when asked for
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("ensemble_attacks", "ensemble_attacks.autoattack", output_directory=tmp_path)
    page = (tmp_path / "ensemble_attacks.html").read_text()
    assert not [name for name in ensemble_attacks.__all__ if f'id="{name}"' not in page]
    assert 'id="AutoAttack.run_standard_evaluation"' in (tmp_path / "ensemble_attacks" / "autoattack.html").read_text()


@pytest.mark.parametrize("page", [*PAGES, Path(__file__).parents[1] / "README.md"], ids=lambda page: page.stem)
def test_configurations_are_read(page: Path) -> None:
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        content = tomllib.loads(block)
        if "models" in content:
            assert Sweep.of(content, str(page)).attacks
