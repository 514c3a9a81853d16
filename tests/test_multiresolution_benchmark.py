"""The benchmark of 'Ensemble everything everywhere': its variants, what it counts, that it goes on, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from benchmarks import multiresolution, surfaces
from benchmarks.multiresolution import ABLATION, JUDGED, OWN_LOG, RAND, VARIANTS, Plan
from benchmarks.recorded import RESULTS
from defenses import load_model
from ensemble_attacks.data import load_dataset

MODEL = "multiresolution_convnet_1"
OPTIONS = [f"--model={MODEL}", "--dataset=digits", "--eps=0.1"]


def run(command: click.Command, *options: str) -> str:
    return CliRunner().invoke(command, [*OPTIONS, *options], catch_exceptions=False).stdout


def changed(name: str) -> Any:
    return VARIANTS[name].of(load_model(MODEL, dataset="digits"), seed=0)


def test_a_variant_changes_one_part() -> None:
    whole, stack = changed("as it is"), changed("coarsest 2 left out").stack
    assert whole.stack.resolutions == (8, 4, 2)
    assert stack.resolutions == (8, 8, 8)
    assert (stack.down_noise, stack.up_noise) == (whole.stack.down_noise, whole.stack.up_noise)
    assert changed("noise x 2").stack.up_noise == 2 * whole.stack.up_noise
    assert (whole.k, changed("k = 4").k) == (2, 4)
    x, _ = load_dataset("digits", n=2)
    for name in ABLATION:
        model = changed(name)
        with torch.no_grad():
            assert torch.equal(model(x), model(x)) == ("frozen" in name)


def test_attacks_leave_records_that_tables_follow_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [case for case in Plan(20, suite=1).cases()["attacks"] if case.attack in ("none", RAND, "transfer")]
    monkeypatch.setattr(Plan, "cases", lambda plan: {"attacks": chosen})
    few = ["--n=2", "--few=1", "--tables=attacks", f"--out={tmp_path}"]
    printed = run(multiresolution.main, *few)
    rows = json.loads((tmp_path / f"{MODEL}_attacks.json").read_text())
    names = ["none", "transfer", OWN_LOG, JUDGED]
    assert [(row["attack on the defense"], row["n"]) for row in rows] == list(zip(names, (2, 2, 1, 1), strict=True))
    record = json.loads((tmp_path / MODEL / "as_it_is_AutoAttack_rand_1x20.json").read_text())
    assert (len(record["own"]), len(record["right"]), record["draws"]) == (1, 1, multiresolution.DRAWS)
    (tmp_path / MODEL / "as_it_is_none_0x0.json").unlink()
    assert run(multiresolution.main, *few) == printed == run(multiresolution.main, *few, "--table-only")


def test_only_self_ensembles_and_enough_draws(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(multiresolution.main, [*OPTIONS, "--model=gal_convnet_3", f"--out={tmp_path}"])
    assert "is no self-ensemble of random resolutions" in wrong.output
    wrong = CliRunner().invoke(multiresolution.main, [*OPTIONS, "--gradients=5", f"--out={tmp_path}"])
    assert "below the 20 draws" in wrong.output
    wrong = CliRunner().invoke(multiresolution.main, [*OPTIONS, "--table-only", f"--out={tmp_path}"])
    assert "holds nothing yet" in wrong.output


def test_the_tables_that_ship_are_those_of_their_records() -> None:
    stem = RESULTS / "multiresolution" / "multiresolution_resnet18_1"
    tables = {path.stem.rpartition("_")[2]: json.loads(path.read_text()) for path in stem.parent.glob(f"{stem.name}_*.json")}
    assert {"attacks", "ablation"} <= set(tables) <= set(Plan().cases())
    for table, rows in tables.items():
        assert multiresolution.rows_of(stem, table, Plan()) == rows
    records = [json.loads(path.read_text()) for path in stem.glob("*.json")]
    assert len({(record["code"], record["seed"], record["eps"], record["weights"]) for record in records}) == 1
    for record in records:
        assert len(record["flags"]) == len(multiresolution.right(record)) == record["n"]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(surfaces.main, "--points=2", "--steps=1", "--eot-iter=1", "--n=2", "--images=1", f"--out={tmp_path / 'seen.png'}")
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    x, y = load_dataset("digits", n=1)
    net = changed("draws frozen")
    at = torch.tensor([-0.1, 0.0, 0.1])
    loss = surfaces.surface(net, x[0], y, (torch.ones_like(x[0]), torch.zeros_like(x[0])), at, seed=0)
    assert torch.equal(loss[:, 0], loss[:, 2])
    with torch.no_grad():
        assert loss[1, 1] == pytest.approx(torch.nn.functional.cross_entropy(net(x), y).item(), rel=1e-4)
