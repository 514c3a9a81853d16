"""A model that answers the judge otherwise than the attack: how many images it is about is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import MORA, AutoAttack
from ensemble_attacks.appeal import contradicted
from ensemble_attacks.attacks.pgd import PGD
from ensemble_attacks.models.ask import as_module
from tests.helpers import make_ensemble, make_member

EPS = 0.05


class TwoFaced(nn.Module):
    """It is sure of the answer where ``cheats`` says so, and an honest network otherwise."""

    def __init__(self, cheats: Callable[[Tensor], bool], images: Tensor) -> None:
        super().__init__()
        self.net, self.cheats = make_member().float(), cheats
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", self.net(images).argmax(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.net(x)
        if not self.cheats(x):
            return scores
        nearest = torch.cdist(x.detach().flatten(1), self.get_buffer("images")).argmin(1)
        return 9 * nn.functional.one_hot(self.get_buffer("labels")[nearest], scores.shape[1]).to(x) + 0 * scores


CHEATS: dict[str, Callable[[Tensor], bool]] = {
    "without gradient": lambda x: not x.requires_grad,
    "in batches": lambda x: len(x) > 1,
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(12, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attack", ["apgd-ce", "ea-apgd-ce"])
@pytest.mark.parametrize("how", CHEATS)
def test_autoattack_says_so(how: str, attack: str, images: Tensor, tmp_path: Path) -> None:
    model = TwoFaced(CHEATS[how], images).eval()
    y = model.get_buffer("labels")
    told = []
    for _ in range(2):  # the second goes on from what the first has stored
        adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=[attack])
        adversary.run_standard_evaluation(images, y, bs=12, state_path=tmp_path / "state")
        told.append(int(adversary.disagreement.sum()))
        assert [flag.value for flag in adversary.flags if flag.name == "disagreement"] == [told[-1]] * bool(told[-1])
        assert not (adversary.disagreement & ~adversary.robust).any()
    assert told[0] == told[1]
    assert told[0] == 12


def test_what_an_attack_saw_in_calls_that_nobody_repeats(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong as long as it is attacked: the judge, and whoever asks again, get the answers of later calls."""
    over = [False]
    model = TwoFaced(lambda x: over[0], images).eval()
    for attack in ("apgd-ce", "ea-apgd-ce"):
        over[0] = False
        adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=[attack])

        def craft(*batch: Any, adversary: AutoAttack = adversary) -> Any:
            over[0] = False
            crafted = AutoAttack._craft(adversary, *batch)
            over[0] = True
            return crafted

        monkeypatch.setattr(adversary, "_craft", craft)
        adversary.run_standard_evaluation(images, model.get_buffer("labels"), bs=12)
        assert adversary.robust.all()
        assert [flag.value for flag in adversary.flags if flag.name == "disagreement"] == [adversary.disagreement.sum()]


@pytest.mark.parametrize("vote", ["softmax", "voting"])
def test_an_honest_model_is_believed(vote: str, images: Tensor) -> None:
    model = make_ensemble(vote, dtype=torch.float32)
    y = model(images).argmax(1)
    attacks = [MORA(model, eps=0.01, steps=3, betas=(0.5,)), PGD(model, eps=0.01, steps=3, n_restarts=1)]
    adversary = AutoAttack(model, eps=0.01, seed=0, verbose=False, attacks_to_run=attacks)
    adversary.run_standard_evaluation(images, y, bs=5)
    assert not adversary.disagreement.any()
    assert "disagreement" not in [flag.name for flag in adversary.flags]
    assert not contradicted(model, images).any()


def test_what_cannot_be_asked_or_is_random_says_nothing(images: Tensor) -> None:
    def numpys(x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy()).flatten(1)[:, :4]

    def drawn(x: Tensor) -> Tensor:
        return torch.rand(len(x), 4)

    for function in (numpys, drawn):
        assert not contradicted(as_module(function), images).any()


def test_scores_that_are_not_finite_are_counted(images: Tensor) -> None:
    class Unsound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_member().float()

        def forward(self, x: Tensor) -> Tensor:
            moved = torch.cdist(x.detach().flatten(1), images.flatten(1)).amin(1, keepdim=True) > 1e-4
            return torch.where(moved, torch.nan, self.net(x))

    model = Unsound().eval()
    adversary = AutoAttack(model, eps=EPS, seed=0, verbose=False, attacks_to_run=["apgd-ce"])
    adversary.run_standard_evaluation(images, model(images).argmax(1), bs=12)
    assert [flag.value > 0 for flag in adversary.flags if flag.name == "non_finite"] == [True]
