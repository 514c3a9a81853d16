"""What a model's own answers tell against it stands in its run, and who takes it out of there is caught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.own import Evaluation, evaluate
from ensemble_attacks.evaluation.units import Unit, chains_of
from tests.evaluation.forgeries import put_number
from tests.evaluation.test_told import TwoFaced


def asked(model: nn.Module, folder: Path) -> Evaluation:
    x = (torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 10).round() / 10
    return evaluate(model, (x, model(x).argmax(1)), eps=0.04, attacks=["ea-apgd-ce"], out=folder)


def units_of(found: Evaluation) -> list[Unit]:
    return chains_of(Ledger(found.folder).manifest)[0]


def differing(found: Evaluation) -> list[str]:
    return [line for finding in found.verify() if finding["differ"] != 0 for line in finding["what"]]


class Flat(nn.Module):
    """Steps, at which no gradient shows the way."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 10).round() / 10)


def test_images_without_gradient_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    found = asked(Flat().eval(), tmp_path / "run")
    assert found.summary["cells"][0]["clean"]["zero_gradients"] == 16
    assert "at 16 of 16 clean images attacks see no gradient" in caplog.text
    assert differing(found) == []
    put_number(units_of(found)[0], "zero_gradients", 0, found.folder)
    assert "zero_gradients is 0, computed anew 16: 1 differ" in differing(found)


def test_contradictions_cannot_be_taken_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = asked(TwoFaced().eval(), tmp_path / "run")
    row: dict[str, Any] = found.summary["cells"][0]["attacks"]["ea-apgd-ce"]
    assert row["disagreement"] > 0
    assert differing(found) == []
    put_number(units_of(found)[1], "disagreement", 0, found.folder)
    (told,) = [line for line in differing(found) if line.startswith("disagreement is 0, the model contradicts itself on")]
    assert told.endswith(": 1 differ")


def test_an_honest_network_has_nothing_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = asked(nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).eval(), tmp_path / "run")
    (cell,) = json.loads((found.folder / "summary.json").read_text())["cells"]
    for row in (cell["clean"], *cell["attacks"].values()):
        assert not {"zero_gradients", "disagreement"} & row.keys()
