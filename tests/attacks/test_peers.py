"""The peers in the loop are as strong as those they stand for."""

from __future__ import annotations

import pytest
import torch
import torchattacks
from torch import Tensor, nn

from ensemble_attacks import A3, CAA, PGD, Ensemble
from tests.helpers import VOTES, slow_but

EPS = 0.12


def left(model: nn.Module, attack: nn.Module, images: Tensor, labels: Tensor) -> int:
    return int((model(attack(images, labels)).argmax(1) == labels).sum())


@pytest.mark.parametrize("digits_model", slow_but(["softmax"], VOTES), indirect=True)
def test_pgd_does_what_torchattacks_does(digits_model: Ensemble, digits: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    theirs = left(digits_model, torchattacks.PGD(digits_model, eps=EPS, alpha=EPS / 4, steps=40), *digits)
    ours = left(digits_model, PGD(digits_model, eps=EPS, steps=40, n_restarts=1), *digits)
    assert abs(ours - theirs) <= 3  # of 100: the random starts differ
    assert left(digits_model, PGD(digits_model, eps=EPS, steps=40, n_restarts=2), *digits) <= theirs


@pytest.mark.parametrize("digits_model", slow_but(["voting"], VOTES), indirect=True)
def test_a3_and_caa_leave_less_than_one_restart_of_cw(digits_model: Ensemble, digits: tuple[Tensor, Tensor]) -> None:
    """Already with a few of A3's restarts, and fewer of CAA's steps."""
    images, labels, eps = digits[0][:30], digits[1][:30], 0.16
    plain = left(digits_model, PGD(digits_model, eps=eps, steps=40, n_restarts=1, loss="margin"), images, labels)
    caa = CAA(digits_model, eps=eps)
    caa.steps = 50
    for attack in (A3(digits_model, eps=eps, n_restarts=4), caa):
        assert left(digits_model, attack, images, labels) < plain
