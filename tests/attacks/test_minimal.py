"""The search for the smallest radius, against closed forms and against the attack's own results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import MORA, PGD, MinimalNorm, judge
from ensemble_attacks.attacks.registry import find_attack, find_maker
from ensemble_attacks.models.passes import count_passes
from tests.attacks.test_oracle import linear_problem

LARGEST = {"Linf": 0.3, "L2": 2.0}


def pgd(model: nn.Module, norm: str, steps: int = 20, **given: Any) -> PGD:
    return PGD(model, norm=norm, eps=LARGEST[norm], steps=steps, n_restarts=1, loss="margin", **given)


def sizes(x: Tensor, x_adv: Tensor, norm: str) -> Tensor:
    return (x_adv - x).flatten(1).norm(float("inf") if norm == "Linf" else 2, dim=1)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_distances_of_a_linear_model(norm: str) -> None:
    model, x, y, optimum = linear_problem(norm)
    x_adv = MinimalNorm(pgd(model, norm))(x[:8], y[:8])
    ratio = sizes(x[:8], x_adv, norm) / optimum[:8]
    assert (ratio >= 1 - 1e-9).all()
    assert ratio.median() < 1.1
    assert not judge(model, x[:8], y[:8], x_adv, eps=LARGEST[norm], norm=norm).robust.any()


def test_images_that_hold_out_and_images_that_are_wrong_already() -> None:
    model, x, y, optimum = linear_problem("Linf")
    attack = pgd(model, "Linf")
    attack.eps = float(optimum.median()) / 2
    wrong = y.clone()
    wrong[0] = (y[0] + 1) % 5
    x_adv = MinimalNorm(attack, searches=8)(x, wrong)
    verdict = judge(model, x, wrong, x_adv, eps=attack.eps)
    assert torch.equal(x_adv[0], x[0])
    assert verdict.robust[1:][optimum[1:] > attack.eps].all()
    assert verdict.fooled[1:][optimum[1:] < 0.9 * attack.eps].all()


def test_it_leaves_the_attack_as_it_was_and_does_not_depend_on_batches() -> None:
    model, x, y, _ = linear_problem("Linf")
    counted = count_passes(model)
    inner = pgd(counted, "Linf", batch_size=3)
    attack = MinimalNorm(inner, searches=6)
    before = {key: value for key, value in vars(inner).items() if not isinstance(value, nn.Module)}
    whole = attack(x[:8], y[:8])
    after = {key: value for key, value in vars(inner).items() if not isinstance(value, nn.Module)}
    assert {key: after[key] for key in before if key != "_modules"} == {k: v for k, v in before.items() if k != "_modules"}
    assert counted.backwards > 0
    attack.batch_size = None
    torch.testing.assert_close(attack(x[:8], y[:8]), whole, rtol=0, atol=1e-9)
    assert attack.eps == inner.eps
    attack.eps = 0.01
    assert inner.eps == 0.01
    assert (sizes(x[:8], attack(x[:8], y[:8]), "Linf") <= 0.01).all()


def test_other_peoples_attacks_are_searched_too() -> None:
    model, x, y, optimum = linear_problem("Linf")
    model = model.float()
    attack = find_maker("minimal:torchattacks:PGD?steps=10&random_start=False")(
        model, norm="Linf", eps=0.3, seed=0, batch_size=None, eot_iter=None
    )
    x_adv = attack(x[:10].float(), y[:10])
    assert (model(x_adv).argmax(1) != y[:10]).all()
    assert (sizes(x[:10].float(), x_adv, "Linf") >= optimum[:10] - 1e-6).all()


def test_names_and_errors() -> None:
    model = linear_problem("Linf")[0]
    record = find_attack("minimal:mora")
    assert record.needs_members
    assert record.make is not None
    searched = record.make(model, norm="Linf", eps=0.3, seed=0, batch_size=None, eot_iter=None)
    assert isinstance(searched, MinimalNorm)
    assert isinstance(searched.inner, MORA)
    with pytest.raises(ValueError, match="no radius to search"):
        find_attack("minimal:autoattack")
    with pytest.raises(ValueError, match="unknown attack"):
        find_attack("minimal:moar")
    with pytest.raises(TypeError, match="attack must be"):
        MinimalNorm(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eps that is a number"):
        MinimalNorm(PGD(model, eps=torch.full((3, 4, 4), 0.1)))
    with pytest.raises(ValueError, match="searches"):
        MinimalNorm(PGD(model, eps=0.1), searches=2)
