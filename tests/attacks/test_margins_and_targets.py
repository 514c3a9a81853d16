"""PMA's loss and schedule, and MALT's order of targets, against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ensemble_attacks import MALT, PMA, Ensemble
from ensemble_attacks.attacks.pma import not_left, probability_margin
from ensemble_attacks.attacks.registry import find_maker
from ensemble_attacks.descent.objectives import Goal
from ensemble_attacks.descent.stages import NEVER, Trace
from ensemble_attacks.models.passes import count_passes


class Linear(nn.Module):
    """Scores of flattened images, in float64; classes 0 and 1 are close in score, and far, as their slopes are the same."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        weight[1] = weight[0] + 0.01 * weight[1]
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.fixture
def images() -> Tensor:
    return 0.3 + 0.4 * torch.rand(40, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_probability_margin_and_its_gradient() -> None:
    z_NK = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, t, rows = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 0, 3]), torch.arange(6)
    p_NK = z_NK.softmax(-1)
    others_NK = p_NK.detach().clone()
    others_NK[rows, y] = 0
    best = others_NK.argmax(1)
    for goal, rival in ((Goal(y), best), (Goal(y, t), t)):
        margin_N = probability_margin(z_NK, goal)
        torch.testing.assert_close(margin_N, p_NK[rows, rival] - p_NK[rows, y])
        # grad PM = p_y grad CE(y) - p_c grad CE(c)
        (slope,) = torch.autograd.grad(margin_N.sum(), z_NK, retain_graph=True)
        ce_y, ce_c = (torch.autograd.grad(-z_NK.log_softmax(-1)[rows, c].sum(), z_NK)[0] for c in (y, rival))
        expected = p_NK[rows, y].unsqueeze(1) * ce_y - p_NK[rows, rival].unsqueeze(1) * ce_c
        torch.testing.assert_close(slope, expected)
    reached = probability_margin(z_NK, Goal(y, t, only=True))
    others_NK = p_NK.detach().clone()
    others_NK[rows, t] = 0
    torch.testing.assert_close(reached, p_NK[rows, t] - others_NK.amax(1))


def test_a_probability_that_rounds_to_one_still_has_a_slope() -> None:
    z_NK = torch.tensor([[40.0, 1.0, 0.0]], requires_grad=True)
    assert z_NK.softmax(-1)[0, 0] == 1
    (slope,) = torch.autograd.grad(not_left(z_NK, Goal(torch.tensor([0]))).sum(), z_NK)
    assert slope[0, 0] < 0 < slope[0, 1]


def test_pma_spends_what_its_record_says(images: Tensor) -> None:
    model = count_passes(Linear())
    attack, attack.trace = PMA(model, eps=1e-9, steps=10), Trace()
    labels = Linear()(images).argmax(1)
    assert torch.equal(Linear()(attack(images, labels)).argmax(1), labels)
    assert [row["stage"] for row in attack.trace.rows() if row["step"] == 1] == [0, 1, 2, 3]
    assert model.backwards == 2 * 10 * len(images)
    assert model.forwards == (1 + 2 * (10 + 2)) * len(images)


def nearest(images: Tensor, labels: Tensor, dual: float) -> Tensor:
    """Return the classes by their distance, which is exact, as the model is linear; the label is last."""
    weight, scores = Linear().weight, Linear()(images)
    apart = (weight[labels].unsqueeze(1) - weight).norm(dual, dim=-1)
    distance = (scores.gather(1, labels.unsqueeze(1)) - scores) / apart
    return distance.nan_to_num(nan=torch.inf).argsort(1)


@pytest.mark.parametrize(("norm", "dual"), [("Linf", 1), ("L2", 2)])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_malt_ranks_by_distance(norm: str, dual: float, batch_size: int | None, images: Tensor) -> None:
    labels = Linear()(images).argmax(1)
    attack = MALT(Linear(), norm=norm, batch_size=batch_size)
    ranked = attack._goal(images, labels, None).ranked
    assert ranked is not None
    assert torch.equal(ranked, nearest(images, labels, dual))
    assert torch.equal(ranked[:, -1], labels)
    by_score = Linear()(images).argsort(1, descending=True)[:, 1:]
    assert not torch.equal(ranked[:, :-1], by_score)
    few = MALT(Linear(), norm=norm, candidates=2)._goal(images, labels, None).ranked
    assert few is not None
    assert torch.equal(few[:, :2].sort(1).values, by_score[:, :2].sort(1).values)


def test_malt_needs_one_target_where_the_model_is_linear(images: Tensor) -> None:
    labels = Linear()(images).argmax(1)
    scores, rows = Linear()(images), torch.arange(len(images))
    first = nearest(images, labels, 1)[:, 0]
    weight = Linear().weight
    distance = (scores[rows, labels] - scores[rows, first]) / (weight[labels] - weight[first]).abs().sum(1)
    eps = distance.median().item()
    attack = MALT(Linear(), eps=eps, targets=1)
    attack.trace = Trace()
    fooled = Linear()(attack(images, labels)).argmax(1) != labels
    assert fooled[distance <= 0.95 * eps].all()
    assert not fooled[distance > eps].any()
    assert torch.equal(attack.trace.fooled_in[0] < NEVER, fooled)


def test_a_class_towards_which_nothing_moves_comes_last(images: Tensor) -> None:
    class Still(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z_NK = Linear()(x)
            return torch.stack([*z_NK[:, :4].unbind(1), z_NK[:, 0] - 1e-3], 1)

    labels = torch.zeros(len(images), dtype=torch.long)
    ranked = MALT(Still())._goal(images, labels, None).ranked
    assert ranked is not None
    assert (ranked[:, -2] == 4).all()


@pytest.mark.parametrize("name", ["pma", "malt"])
@pytest.mark.parametrize("vote", ["softmax", "voting", "logits"])
def test_they_attack_every_vote_by_name(name: str, vote: str, images: Tensor) -> None:
    model = Ensemble([Linear(), Linear()], vote)
    labels = model(images).argmax(1)
    attack = find_maker(f"{name}?steps=20")(model, norm="Linf", eps=0.2, seed=0, batch_size=None)
    assert (model(attack(images, labels)).argmax(1) != labels).double().mean() > 0.5
    attack.set_mode_targeted_by_label(quiet=True)
    targets = (labels + 1) % 5
    towards = model(attack(images, targets)).argmax(1)
    assert (towards == targets).any()


def test_malt_needs_four_classes(images: Tensor) -> None:
    with pytest.raises(ValueError, match="needs at least 4 classes"):
        MALT(nn.Sequential(nn.Flatten(), nn.Linear(12, 3, dtype=torch.float64)))(images, torch.zeros(40, dtype=torch.long))
    with pytest.raises(ValueError, match="candidates"):
        MALT(Linear(), candidates=0)
    with pytest.raises(ValueError, match="steps"):
        PMA(Linear(), steps=1)
