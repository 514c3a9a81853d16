"""A model of one's own that draws its members with what are no probabilities is refused, in one line, everywhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks import ARC, EOTAPGD, LCA, MORA, judge
from ensemble_attacks.models.structure import structure_of


class Drawn(nn.Module):
    """An ensemble that answers with one of two members, as a user would write it."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)) for _ in range(2))
        self.probabilities = torch.tensor(probabilities)

    def member_logits(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members])

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return logits_MNK.softmax(-1).mean(0).log()

    def forward(self, x: Tensor) -> Tensor:
        return self.members[int(torch.rand(()) < 0.5)](x)


X, Y = torch.rand(4, 1, 4, 4), torch.tensor([0, 1, 2, 0])
ATTACKS: list[Callable[..., Attack]] = [ARC, EOTAPGD, LCA, MORA]


@pytest.mark.parametrize("probabilities", [[0.7, 0.7], [1.2, -0.2], [torch.nan, 0.5], [0.0, 0.0], []], ids=str)
def test_they_must_be_probabilities(probabilities: list[float]) -> None:
    model = Drawn(probabilities).eval()
    for ask in (lambda: MORA(model, eps=0.1), lambda: judge(model, X, Y, X, eps=0.1), lambda: structure_of(model, X)):
        with pytest.raises(ValueError, match="probabilities of Drawn"):
            ask()


@pytest.mark.parametrize("make", ATTACKS)
def test_there_must_be_one_for_each_member(make: Callable[..., Attack]) -> None:
    attack = make(Drawn([0.5, 0.3, 0.2]).eval(), eps=0.1)
    if isinstance(attack, MORA):
        attack.eot_iter = 2
    with pytest.raises(ValueError, match="3, but member_logits returns 2"):
        attack(X, Y)


def test_those_in_half_precision_pass() -> None:
    model = Drawn([1 / 3, 2 / 3]).eval()
    model.probabilities = model.probabilities.bfloat16()
    assert judge(model, X, Y, X, eps=0.1, draws=3).correct.shape == (3, 4)
