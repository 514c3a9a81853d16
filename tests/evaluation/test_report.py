"""A run as a page: complete, self-contained, and safe to open."""

from __future__ import annotations

import csv
import html
import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from ensemble_attacks import LedgerError
from ensemble_attacks.cli.group import main
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.report.pages import write_report
from ensemble_attacks.evaluation.report.tables import write_csv
from ensemble_attacks.evaluation.settings import Sweep
from tests.evaluation.test_ledger import ledger_in

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports


def test_a_report_of_a_run(tmp_path: Path) -> None:
    sizes = dict(n=4, shard_size=2)  # of a range of fewer than a diagnosis needs
    run(ledger_in(tmp_path / "run", eps=(0.12, 0.3), attacks=("mora?steps=20", "torchattacks:FGSM"), **sizes))
    result = CliRunner().invoke(main, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run" / "report"
    page = (folder / "report.html").read_text()
    assert "http" not in re.sub(r'<a href="https://[a-z.]+/[^"<>]*" rel="noreferrer">', "", page)  # no network but links
    assert (
        page.count("<figure>")
        == len(list((folder / "figures").glob("*.png")))
        == len(list((folder / "figures").glob("*.pdf")))
    )
    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["attack"] for row in rows] == ["clean", "mora?steps=20", "torchattacks:FGSM", "worst case"] * 2
    for row in rows:
        assert f">{float(row['robust %'])}</td>" in page
    assert 'name="viewport"' in page
    assert page.count("prefers-color-scheme") == 1  # and one in each drawing
    assert page.count('href="#cell-') == 2
    assert Sweep.of(tomllib.loads(html.unescape(page.split('<pre class="toml">')[1].split("</pre>")[0])), "it").eps == (
        0.12,
        0.3,
    )
    with (folder / "images_0.csv").open() as file:
        images = list(csv.DictReader(file))
    assert [row["image"] for row in images] == list("0123")  # of both ranges
    assert all(row["passes"] or not row["fooled by"] or row["fooled by"].startswith("clean") for row in images)
    assert not list(folder.parent.glob(".report*"))
    text = (folder / "report.md").read_text()
    for part in ("Is the gradient masked?", "torchattacks:FGSM", "weights of gal_convnet_3", "figures/eps.png"):
        assert part in text
    assert "exists: choose another folder" in CliRunner().invoke(main, ["report", str(tmp_path / "run")]).output


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    ledger_in(tmp_path / "run")
    with pytest.raises(LedgerError, match="is not finished"):
        write_report(tmp_path / "run", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_spreadsheet_gets_no_formula(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", ("name", "figure"), [("=cmd|' /C calc'!A0", -1.5)])
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "'=cmd|' /C calc'!A0,-1.5"


def test_a_report_of_two_seeds_without_traces(tmp_path: Path) -> None:
    run(ledger_in(tmp_path / "run", seeds=(0, 1), attacks=("torchattacks:FGSM",), n=3, cascade=True))
    write_report(tmp_path / "run", tmp_path / "report")
    names = {path.stem for path in (tmp_path / "report" / "figures").glob("*.png")}
    assert not any(name.startswith(("eps", "convergence")) for name in names)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "gal_convnet_3, softmax, Linf 0.12, seed 1: members fooled by torchattacks:FGSM, on " in text
