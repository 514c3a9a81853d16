"""Every Python block of the documentation runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ensemble_attacks.evaluation.sweep import Sweep

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
    assert bool(blocks) == bool(capsys.readouterr().out)


@pytest.mark.parametrize("page", [*PAGES, Path(__file__).parents[1] / "README.md"], ids=lambda page: page.stem)
def test_configurations_are_read(page: Path) -> None:
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL):
        content = tomllib.loads(block)
        if "models" in content:
            assert Sweep.of(content, str(page)).attacks
