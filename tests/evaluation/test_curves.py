"""The curve of robust accuracy against the radius: from a run's images, in a report, and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemble_attacks import evaluate
from ensemble_attacks.evaluation import manifest
from ensemble_attacks.evaluation.curves import ALL, Curve, curves_of
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.report.figures import by_distance
from tests.attacks.test_oracle import linear_problem
from tests.evaluation.test_runner import invoke

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what matplotlib imports


def test_a_curve_is_read_from_distances() -> None:
    curve = Curve("x", torch.tensor([0.0, 0.1, 0.2, torch.inf], dtype=torch.double))
    assert [curve.robust(radius)[0] for radius in (0.0, 0.1, 0.15, 0.2, 9.0)] == [0.75, 0.5, 0.5, 0.25, 0.25]
    assert [curve.radius(share) for share in (1.0, 0.75, 0.5, 0.25, 0.1)] == [0.0, 0.0, 0.1, 0.2, float("inf")]
    assert [point[:2] for point in curve.points()] == [(0.0, 0.75), (0.1, 0.5), (0.2, 0.25)]
    assert all(low <= share <= high for _, share, low, high in curve.points())


@pytest.mark.slow
def test_a_runs_curve(tmp_path: Path) -> None:
    model, x, y, optimum = linear_problem("Linf")
    model, x, n = model.float(), x.float()[:6], 6
    attacks = ["minimal:ea-apgd-dlr", "minimal:cw"]
    np.savez(tmp_path / "images.npz", images=x.numpy(), labels=y[:n].numpy())
    found = evaluate(model, tmp_path / "images.npz", eps=0.3, attacks=attacks, out=tmp_path / "run", shard_size=4)
    ((cell, curves, classes),) = curves_of(Ledger(found.folder))
    assert [curve.attack for curve in curves] == ["ea-apgd-dlr", "cw", ALL]
    assert cell.eps == 0.3
    assert classes == len(y[:n].unique())
    for curve in curves:
        ratio = curve.distance_N / optimum[:n]
        assert (ratio > 1 - 1e-5).all()
        assert ratio.median() < 1.1
    assert torch.equal(curves[-1].distance_N, curves[0].distance_N.minimum(curves[1].distance_N))
    (picture,) = by_distance(Ledger(found.folder))
    assert picture.columns == ("attack", "radius", "robust %", "low", "high")
    assert {row[0] for row in picture.rows} == {curve.attack for curve in curves}


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps: list[Any] = []

    def stop(sweep: Any, **places: Any) -> None:
        sweeps.append(sweep)
        raise ValueError("as far as here")

    monkeypatch.setattr(manifest, "manifest_of", stop)
    for options in ((), ("--attacks", "cw,minimal:pgd")):
        assert invoke("evaluate", "--model", "standard_convnet_3", "--eps", "0.5", "--curve", *options).exit_code
    assert [sweep.attacks for sweep in sweeps] == [("minimal:mora",), ("minimal:cw", "minimal:pgd")]
