"""Attacks on ensembles that draw their members, against what linear programmes say can be fooled."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import ARC, LCA, NotAnEnsembleError
from ensemble_attacks.descent.objectives import Goal, cross_entropy, log_expected
from ensemble_attacks.diagnostics.advice import adaptive_attacks
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.models.aggregations import log_mean_softmax, log_soft_votes
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.models.view import Outputs
from tests.attacks.test_oracle import PIXELS, Linear, dense_members, images_inside_the_box
from tests.helpers import make_ensemble

PROBABILITIES = (0.45, 0.35, 0.2)


def distances(member: Linear, scores_NK: Tensor, labels: Tensor) -> Tensor:
    """Linf distances to a linear member's boundaries with the other classes, (N, K), infinite for the label."""
    dual = (member.weight[labels].unsqueeze(1) - member.weight).abs().sum(-1)
    lead = scores_NK.gather(-1, labels.unsqueeze(1)) - scores_NK
    return (lead / dual.clamp_min(1e-12)).scatter(1, labels.unsqueeze(1), torch.inf)


def mixture() -> tuple[RandomizedEnsemble, Tensor, Tensor, Tensor]:
    """A mixture of three linear members, images on which all agree, their labels, and each member's distances (M, N, 2)."""
    members, images = dense_members(classes=2), images_inside_the_box()
    logits = torch.stack([member(images) for member in members])
    agreed = (logits.argmax(-1) == logits[0].argmax(-1)).all(0)
    images, labels, logits = images[agreed], logits[0, agreed].argmax(-1), logits[:, agreed]
    distance = torch.stack([distances(*each, labels) for each in zip(members, logits, strict=True)])
    return RandomizedEnsemble(members, PROBABILITIES, seed=0).eval(), images, labels, distance


def fooled(model: RandomizedEnsemble, adversarial: Tensor, labels: Tensor) -> Tensor:
    """Which members are wrong, (M, N)."""
    return model.member_logits(adversarial).argmax(-1) != labels


def can_be_fooled(members: list[Linear], which: tuple[int, ...], image: Tensor, label: int, eps: float) -> bool:
    """Tell by a linear programme whether one perturbation makes all of these two-class members wrong."""
    rows, limits = [], []
    for index in which:
        slope = (members[index].weight[label] - members[index].weight[1 - label]).numpy()
        bias = (members[index].bias[label] - members[index].bias[1 - label]).item()
        rows.append(slope)
        limits.append(-(slope @ image.flatten().numpy() + bias) - 1e-9)
    return bool(linprog(np.zeros(len(rows[0])), A_ub=rows, b_ub=limits, bounds=(-eps, eps)).success)


def test_lca_fools_a_maximal_set_of_members() -> None:
    model, images, labels, distance = mixture()
    eps = float(distance.amin(-1).amin(0).median()) * 4
    wrong = fooled(model, LCA(model, eps=eps, steps=30, n_restarts=2)(images, labels), labels)
    assert wrong.any(0)[distance.amin(-1).amin(0) <= 0.95 * eps].all()  # effective
    members: list[Linear] = list(model.members)  # type: ignore[arg-type]
    larger = 0
    for n in range(len(images)):
        own = {int(index) for index in torch.nonzero(wrong[:, n]).flatten()}
        sets = [set(s) for size in (1, 2, 3) for s in combinations(range(3), size)]
        more = [s for s in sets if own < s]
        assert not any(can_be_fooled(members, tuple(s), images[n], int(labels[n]), 0.95 * eps) for s in more)
        larger += len(own) > 1
    assert larger >= 3


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_arc_with_the_consistent_step_fools_one_where_one_can_be_fooled(norm: str) -> None:
    model, images, labels, distance = mixture()
    nearest = distance.amin(-1).amin(0)
    eps = float(nearest.median()) * 1.3
    if norm == "L2":
        weight = torch.stack([member.get_buffer("weight") for member in model.members])
        apart = weight[:, 0] - weight[:, 1]
        nearest = (distance.amin(-1) * (apart.abs().sum(-1) / apart.norm(dim=-1)).unsqueeze(1)).amin(0)
        eps = float(nearest.median()) * 1.3
    wrong = fooled(model, ARC(model, norm=norm, eps=eps, steps=5, consistent=True)(images, labels), labels)
    assert wrong.any(0)[nearest <= 0.95 * eps].all()


def test_arc_goes_to_the_nearest_of_all_boundaries() -> None:
    weight = dense_members(classes=5)[0].weight * torch.tensor([1.0, 1, 1, 3, 6]).unsqueeze(1)
    member, images = Linear(weight, -weight @ torch.full((PIXELS,), 0.5, dtype=torch.float64)), images_inside_the_box()
    alone, scores = RandomizedEnsemble([member], seed=0).eval(), member(images)
    labels = scores.argmax(1)
    nearest = distances(member, scores, labels).amin(-1)
    eps = float(nearest.median())
    every = fooled(alone, ARC(alone, eps=eps, steps=1)(images, labels), labels)[0]
    assert torch.equal(every[(nearest - eps).abs() > 0.01 * eps], (nearest < eps)[(nearest - eps).abs() > 0.01 * eps])
    one = fooled(alone, ARC(alone, eps=eps, steps=1, planes=1)(images, labels), labels)[0]
    assert (every & ~one).any()
    assert not (one & ~every).any()


def test_the_loss_of_draws_has_the_direction_of_the_expected_probability() -> None:
    logits = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(6) % 5
    for goal in (Goal(labels), Goal(labels, (labels + 1) % 5)):
        drawn = torch.stack([log_expected(Outputs(logits_NK), goal) for logits_NK in logits]).mean(0)
        exact = cross_entropy(log_mean_softmax(logits), goal)
        ours, theirs = (torch.autograd.grad(loss.sum(), logits)[0] for loss in (drawn, exact))
        ours, theirs = ours.transpose(0, 1).flatten(1), theirs.transpose(0, 1).flatten(1)
        cosine = nn.functional.cosine_similarity(ours, theirs)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))
        assert torch.equal(drawn.argsort(), exact.argsort())
    known = Outputs(log_mean_softmax(logits), logits, logits, torch.full((4,), 0.25))
    torch.testing.assert_close(log_expected(known, Goal(labels)), cross_entropy(log_mean_softmax(logits), Goal(labels)))


def test_soft_votes_say_one_of_the_best_class_however_sure_a_member_is() -> None:
    logits = torch.randn(3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_soft_votes(logits), log_soft_votes(logits * torch.tensor([1.0, 5, 50]).view(3, 1, 1)))
    scaled = log_soft_votes(logits, torch.tensor([1.0, 0, 0])).exp()
    top = (logits[0] / logits[0].topk(2, -1).values.diff(dim=-1).abs()).softmax(-1)
    torch.testing.assert_close(scaled, top)


def test_lca_needs_probabilities() -> None:
    with pytest.raises(NotAnEnsembleError, match="LCA needs the probabilities"):
        LCA(make_ensemble())


def test_baselines_and_mixtures_are_known_by_name(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = (t[:4] for t in batch)
    hard = make_ensemble("voting", dtype=torch.float32)
    names = [f"{name}?steps=20" for name in ("soft-pgd", "soft-apgd", "votes-pgd", "votes-apgd")]
    found = evaluate(hard, images.float(), labels, names, Settings(0.05))["attacks"]
    assert list(found) == names
    drawn = RandomizedEnsemble(list(hard.members), seed=0).eval()
    names = ["expected-apgd?steps=20", "lca?steps=20"]
    found = evaluate(drawn, images.float(), labels, names, Settings(0.03, draws=2, eot_iter=2))["attacks"]
    assert all(row["accuracy"] < 1 and "worst_of_draws" in row for row in found.values())
    chosen = adaptive_attacks(structure_of(drawn, images.float()))
    assert chosen == ["expected-apgd", "mora", "lca", "eot-apgd"]
