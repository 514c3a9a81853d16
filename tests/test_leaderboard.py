"""The board of defenses, and the curves over radii: what is run once, and made again from its records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import crossmax, frontends, leaderboard, radii

RUN = ["--datasets=digits", "--n=5", "--models=standard_convnet_3"]


def board(out: Path, *options: str) -> list[dict[str, Any]]:
    CliRunner().invoke(leaderboard.main, [*options, f"--out={out}"], catch_exceptions=False)
    return json.loads((out / "leaderboard.json").read_text())


def test_a_board_is_made_again_from_records_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaderboard.Entry, "attacks", ("soft-apgd?steps=5", leaderboard.MEAN))
    monkeypatch.setattr(leaderboard, "VOTES", ("voting",))
    monkeypatch.setattr(leaderboard, "SURROGATES", leaderboard.Entry.attacks)
    monkeypatch.setattr(leaderboard, "diagnose", lambda *_, **__: SimpleNamespace(flags=["transfer_gap"]))
    (row,) = board(tmp_path / "board", *RUN)
    assert row["best plain surrogate"] == row["best known"] < row["clean"]
    assert row["flags"] == "transfer_gap"
    cell = "standard_convnet_3_voting_0.12_seed0"
    assert {path.name for path in (tmp_path / "board" / "digits" / cell).iterdir()} >= {"0_soft-apgd_steps_5", "flags.json"}
    shutil.move(tmp_path / "board" / "digits" / cell, tmp_path / "table1" / cell)
    assert board(tmp_path / "board", *RUN, "--table-only") == [row]
    shutil.rmtree(tmp_path / "table1")
    assert board(tmp_path / "board", *RUN, "--table-only") == [row]


def test_radii_are_run_once_and_drawn(tmp_path: Path) -> None:
    options = [
        "--dataset=digits",
        "--models=gal_convnet_3",
        "--votes=voting",
        "--radii=0.25,0.35",
        "--n=6",
        f"--out={tmp_path}",
    ]
    run = CliRunner().invoke(radii.main, options, catch_exceptions=False)
    small, large = json.loads((tmp_path / "digits.json").read_text())
    assert small["clean"] >= small["mora"] >= large["mora"]
    assert small["lead"].startswith("0.0 [")
    assert (tmp_path / "digits.png").stat().st_size > 1000
    again = CliRunner().invoke(radii.main, [*options, "--table-only"], catch_exceptions=False)
    assert again.output == run.output


def test_attacks_on_front_ends_and_on_crossmax_are_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontends, "KINDS", {"one network": ("pgd?steps=2",), "randomized": ("eot-apgd?steps=2",)})

    same = ["--dataset=digits", "--n=4", "--eps=0.3", f"--out={tmp_path}"]
    for command, options in (
        (frontends.main, ["--model=frontend_convnet_3"]),
        (crossmax.main, ["--models=standard_convnet_3,gal_convnet_3", "--attacks=APGD-100,PGD-100 on the mean"]),
    ):
        run = CliRunner().invoke(command, [*same, *options], catch_exceptions=False)
        again = CliRunner().invoke(command, [*same, *options, "--table-only"], catch_exceptions=False)
        assert again.output.splitlines()[2:] == run.output.splitlines()[-len(again.output.splitlines()) + 2 :]
    rows = json.loads((tmp_path / "frontend_convnet_3_digits.json").read_text())
    assert [row["attack"] for row in rows] == ["clean", "pgd?steps=2", "clean", "eot-apgd?steps=2"]
    rows = json.loads((tmp_path / "digits.json").read_text())
    assert [row["attack"] for row in rows] == ["none", "APGD-100", "PGD-100 on the mean"]
    assert rows[0]["robust"] >= rows[1]["robust"]
