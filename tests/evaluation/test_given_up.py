"""A run of which something was given up is reported and exported as far as it went, and says on how many images."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import Tensor

from ensemble_attacks import LedgerError
from ensemble_attacks.cli.group import main
from ensemble_attacks.evaluation import runner
from ensemble_attacks.evaluation.engines import run
from ensemble_attacks.evaluation.external import compare_bundle, export_robustbench
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.report.pages import write_report
from ensemble_attacks.evaluation.units import chains_of
from tests.evaluation.test_ledger import ledger_in

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports
FGSM, PGD = "torchattacks:FGSM?eps=0.01", "torchattacks:PGD?steps=2"  # the first leaves some to the second
SAID = f"gal_convnet_3, softmax, Linf 0.12: {PGD} is there on 2 of 3 images, it failed on the others"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "cascade"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranges, of which one attack was given up on the second."""
    folder = tmp_path_factory.mktemp("half") / "run"
    before, seen = runner._attack, []

    def failing(model: Any, twin: Any, x: Tensor, y: Tensor, name: str, settings: Any) -> Any:
        seen.append(name)
        if name == PGD and seen.count(name) > 1:
            raise RuntimeError("out of luck")
        return before(model, twin, x, y, name, settings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "_attack", failing)
        run(ledger_in(folder, attacks=(FGSM, PGD), n=3, shard_size=2, cascade=request.param))
    return folder


def test_a_report_says_what_is_missing(half: Path, tmp_path: Path) -> None:
    write_report(half, folder := tmp_path / "report")
    with (folder / "table.csv").open() as file:
        names = [row["attack"] for row in csv.DictReader(file)]
    assert names == ["clean", FGSM, f"{PGD} (on 2 of 3 images)", "worst case"]
    for name in ("report.md", "report.html"):
        assert SAID in (folder / name).read_text()


def test_the_worst_case_is_over_what_is_there(half: Path) -> None:
    (cell,) = json.loads((half / "summary.json").read_text())["cells"]
    assert {name: row["n"] for name, row in cell["attacks"].items()} == {FGSM: 3, PGD: 2}
    assert cell["worst_case"]["n"] == 3
    assert cell["worst_case"]["accuracy"] <= cell["attacks"][FGSM]["accuracy"]
    assert cell["missing"] == [f"gal_convnet_3 softmax 0.12 {PGD} 2-3"]


def test_a_bundle_says_what_is_missing(half: Path, tmp_path: Path) -> None:
    bundle = export_robustbench(half, tmp_path / "bundle", partial=True)
    text = (bundle / "evaluation.md").read_text()
    assert f"Not complete: {SAID}." in text
    assert f"- {PGD} (on 2 of 3 images): " in text
    assert compare_bundle(Ledger(half), bundle) == []
    told = invoke("verify", bundle, "--model", "gal_convnet_3")
    assert told.exit_code == 0, told.output
    assert f"not verifiable: gal_convnet_3 softmax 0.12 {PGD} 2-3, which the bundle says was given up" in told.output


def test_the_command_says_so_and_resume_mends_it(half: Path, tmp_path: Path) -> None:
    told = invoke("verify", half)
    assert told.exit_code == 1
    assert f"{PGD} 2-3: missing" in told.output.replace(";", "").replace("  ", " ")
    ledger = Ledger(half)
    damaged = half / "units" / f"{chains_of(ledger.manifest)[0][1].identity}.json"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9])  # no failure of an attack's: it can be computed again
    with pytest.raises(LedgerError, match="is not finished"):
        write_report(half, tmp_path / "report")
    damaged.write_bytes(whole)
    assert not (tmp_path / "report").exists()


def test_a_run_of_which_all_was_given_up_has_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("ensemble_attacks.evaluation.chains.run_unit", failing)
    run(ledger_in(tmp_path / "run", attacks=(FGSM,), n=4, shard_size=4))
    with pytest.raises(LedgerError, match="all was given up"):
        write_report(tmp_path / "run", tmp_path / "report")
