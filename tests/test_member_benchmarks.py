"""Benchmarks of larger ensembles and of purifiers: what they count, and that they go on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import members, purified
from benchmarks.transfer import from_others
from defenses import load_model
from ensemble_attacks.data import load_dataset


def test_a_table_of_members_is_made_once(tmp_path: Path) -> None:
    cell = "standard_convnet_3:voting:0.3"
    options = ["--dataset=digits", "--n=8", "--shard=8", "--eps=0.3", f"--cells={cell}", f"--out={tmp_path}"]
    run = CliRunner().invoke(members.main, [*options, "--attacks=mora"], catch_exceptions=False)
    (row,) = json.loads((tmp_path / "digits.json").read_text())
    assert (row["members"], row["n"], row["clean"]) == (3, 8, 100.0)
    assert row["MORA"] < row["clean"]
    again = CliRunner().invoke(members.main, [*options, "--attacks=mora", "--table-only"], catch_exceptions=False)
    assert again.output in run.output


def test_mixed_and_adversarially_trained_ensembles_are_among_the_cells() -> None:
    cells = {cell.name for cell in members.cells_of("cifar10", None, members.SIZES["cifar10"])}
    assert {"standard_mixed_3:voting:0.01", "each_at_mixed_3:voting:0.03", "gal_resnet20_8:softmax:0.01"} <= cells


def test_what_carries_over_from_all_other_members() -> None:
    x, y = load_dataset("digits", n=6)
    (net, *_) = load_model("standard_convnet_3", dataset="digits").members
    twins = type(load_model("standard_convnet_3", dataset="digits").members)([net, net])
    assert from_others(twins, x, y, eps=0.5, steps=5) == [100, 100]
    assert from_others(twins, x, y, eps=1e-4, steps=1) == [0, 0]


def test_a_purifier_is_judged_by_more_draws_than_attacks_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few: dict[str, Any] = {"steps": 5}
    monkeypatch.setattr(purified, "JUDGED", 12)
    monkeypatch.setattr(purified, "ATTACKS", {name: partial(make, **few) for name, make in purified.ATTACKS.items()})
    monkeypatch.setattr(purified, "rand", partial(purified.past, **few))  # AutoAttack's takes 20 draws of 200 steps
    options = ["--model=purified_convnet_1", "--dataset=digits", "--n=3", "--eps=0.5", "--looks=1", f"--out={tmp_path}"]
    run = CliRunner().invoke(purified.main, options, catch_exceptions=False)
    rows = {row["attack"]: row for row in json.loads((tmp_path / "purified_convnet_1_digits.json").read_text())}
    assert rows["none"]["mean"] > 50 > rows["EOTAPGD"]["mean"]
    assert all(row["right in all of 10"] <= row["mean"] for row in rows.values())
    record = json.loads((tmp_path / purified.record_name("purified_convnet_1", "EOTAPGD", 1)).read_text())
    assert record["draws"] == purified.JUDGED > record["looks"]
    assert len(record["right"]) == 3
    again = CliRunner().invoke(purified.main, options, catch_exceptions=False)
    assert again.output.splitlines()[-6:] == run.output.splitlines()[-6:]
