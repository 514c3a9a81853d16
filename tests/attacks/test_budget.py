"""Passes that attacks may spend: a change that spends more, or leaves more robust, fails."""

from __future__ import annotations

import pytest
from torch import Tensor

from defenses import load_model
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.models.passes import passes_per_image
from tests.helpers import slow_but

N = 50
SLACK = 1.03  # other hardware rounds otherwise, and an image on the boundary stays for longer
BUDGET = {  # (model, vote, attack): robust images of N, passes per image; digits, Linf 0.12, seed 0
    ("standard_convnet_3", "softmax", "mora"): (14, 297.9),
    ("gal_convnet_3", "softmax", "mora"): (6, 149.7),
    ("gal_convnet_3", "voting", "mora"): (1, 39.3),
    ("gal_convnet_3", "voting", "mora-mt"): (1, 75.5),
    ("gal_convnet_3", "logits", "mora"): (15, 307.1),
    ("gal_convnet_3", "softmax", "ea-apgd-ce"): (14, 68.8),
    ("gal_convnet_3", "voting", "pgd"): (27, 620.2),
}
FULL = {"mora": 1005, "mora-mt": 2814, "ea-apgd-ce": 201, "pgd": 1005}  # passes of an image that stays robust


FAST = [case for case, (_, passes) in BUDGET.items() if passes < 70]


@pytest.mark.parametrize(("model", "vote", "attack"), slow_but(FAST, BUDGET))
def test_passes_stay_within_budget(model: str, vote: str, attack: str, digits: tuple[Tensor, Tensor]) -> None:
    robust, passes = BUDGET[model, vote, attack]
    x, y = digits[0][:N], digits[1][:N]
    row = evaluate(load_model(model, dataset="digits", vote=vote), x, y, [attack], Settings(eps=0.12))["attacks"][attack]
    assert row["robust"] <= robust + 1
    more = max(0, row["robust"] - robust) * FULL[attack] / N
    assert passes_per_image(row) <= SLACK * passes + 2 + more
