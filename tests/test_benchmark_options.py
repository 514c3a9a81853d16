"""Benchmarks that name models and data take any, as the command line does."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import ablation, transfer
from benchmarks.options import EPS, file_name, members_of
from tests.evaluation.own import write_folder

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports


def test_a_benchmark_of_a_user_s_own_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_folder(tmp_path / "theirs"))
    options = ["--model", "nets.py:make", "--data", "images.npz", "--eps", "8/255", "--n", "10", "--steps", "2"]
    done = CliRunner().invoke(transfer.main, [*options, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    (summary,) = tmp_path.glob("out/*.summary.json")
    assert json.loads(summary.read_text())["eps"] == 8 / 255
    assert len(members_of("nets.py:make,(nets.py:make?members=2)", None, "images.npz")) == 5
    with pytest.raises(click.BadParameter, match="is no ensemble of several networks"):
        members_of("nets.py:single", None, "images.npz")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "digits", "--models", "nope"], "nope"),
        (["--data-dir", "/nowhere"], "cifar-10-batches-py"),
        (["--data", "nope"], "unknown dataset"),
        (["--data", "digits", "--n", "0"], "n must be at least 1"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(options: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(ablation.main, [*options, "--out", str(tmp_path / "out")])
    assert (done.exit_code, type(done.exception)) == (2, SystemExit), done.exception
    assert said in done.output.splitlines()[-1]
    debugged = CliRunner().invoke(ablation.main, [*options, "--out", str(tmp_path / "out"), "--debug"])
    assert isinstance(debugged.exception, (ValueError, OSError))


def test_radii_and_names_of_files() -> None:
    assert EPS.convert("6/255", None, None) == 6 / 255
    with pytest.raises(click.BadParameter, match=r"write it as 0\.03 or 8/255"):
        EPS.convert("six", None, None)
    assert file_name("gal_convnet_3") == "gal_convnet_3"
    assert file_name("nets.py:make?vote=voting") == "nets.py_make_vote_voting"
