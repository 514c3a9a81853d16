"""AutoAttack on any input in any box: on a linear model, what it finds is the worst case."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from ensemble_attacks import AutoAttack, Box, Ensemble, judge
from tests.attacks.test_any_input import KINDS, SHAPES, N, boxes, inputs, least_margin
from tests.helpers import slow_but


@pytest.mark.parametrize(("shape", "kind"), slow_but(list(zip(SHAPES, KINDS, strict=True)), product(SHAPES, KINDS)))
def test_the_worst_case_of_a_linear_model(shape: str, kind: str) -> None:
    box = boxes(SHAPES[shape])[kind]
    model, x, y = inputs(SHAPES[shape], box)
    model, x = model.float(), x.float()
    width: Any = torch.as_tensor(box.width, dtype=torch.double)
    eps = 0.05 * (width if width.dim() else width.item())
    adversary = AutoAttack(model, eps=eps, seed=0, verbose=False, attacks_to_run=["apgd-ce", "fab-t", "square"], box=box)
    adversary.apgd.n_iter, adversary.square.n_queries, adversary.fab.n_iter = 20, 20, 5
    found: Any = adversary.run_standard_evaluation(x, y)
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    verdict = judge(model, x, y, found, eps=eps, box=box)
    least = least_margin(model.double(), x.double(), y, torch.as_tensor(eps, dtype=torch.double).expand(SHAPES[shape]), box)
    sure = least.abs() > 1e-3
    assert torch.equal(verdict.fooled[sure], least[sure] < 0)
    assert torch.equal(adversary.robust.cpu(), verdict.robust)
    assert 0 < int(verdict.robust.sum()) < N


def test_our_attacks_run_on_the_members_through_the_box() -> None:
    box = Box(-1, 1)
    model, x, y = inputs((20,), box)
    x, y = x[:6], y[:6]
    adversary = AutoAttack(Ensemble([model]).eval(), eps=0.1, seed=0, verbose=False, attacks_to_run=["mora"], box=box)
    found: Any = adversary.run_standard_evaluation(x, y)
    least = least_margin(model, x, y, torch.full((20,), 0.1, dtype=torch.double), box)
    assert torch.equal(judge(model, x, y, found, eps=0.1, box=box).fooled, least < 0)


def test_what_autoattack_cannot_do_in_a_box_is_told_before_any_work() -> None:
    box = boxes((20,))["features"]
    model, x, y = inputs((20,), box)
    asked: list[int] = []
    model.register_forward_hook(lambda *_: asked.append(1))
    given: dict[str, Any] = {"seed": 0, "verbose": False, "attacks_to_run": ["apgd-ce"], "box": box}
    with pytest.raises(ValueError, match="AutoAttack's own attacks know one eps"):
        AutoAttack(model, eps=0.1, **given).run_standard_evaluation(x, y)
    with pytest.raises(ValueError, match="expected values in"):
        AutoAttack(model, eps=0.1, **given | {"box": Box(0, 1)}).run_standard_evaluation(x, y)
    with pytest.raises(ValueError, match="did you mean eps = 8/255"):
        AutoAttack(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), eps=8).run_standard_evaluation(
            torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
        )
    assert not asked
