"""MORA's closed forms against automatic differentiation, and its behaviour at the edges of floating point."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ensemble_attacks.attacks.mora import WEIGHT_RULES, log_reweighing, mora, reweigh
from ensemble_attacks.descent.objectives import Goal, ce, dlr, dlr_targeted, normalize_margin
from ensemble_attacks.models.aggregations import gaps
from ensemble_attacks.models.votes import LOGITS, OWN, SOFTMAX, Vote, as_vote, mean_logits
from ensemble_attacks.models.votes import VOTES as AGGREGATES
from ensemble_attacks.scores import best_other, gather, margin
from tests.helpers import VOTES

TAUS = (0.1, 1.0, 5.0)


def problem(classes: int = 5, members: int = 3, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(members, 40, classes, dtype=torch.float64, generator=generator)
    labels = logits.softmax(-1).mean(0).argmax(1)
    return logits, labels, best_other(logits.softmax(-1).mean(0), labels)


def derivative(logits: Tensor, labels: Tensor, others: Tensor, tau: float, moved: Tensor, sign: float) -> Tensor:
    """d(E_y - E_other)/dz^m at one class, by automatic differentiation."""
    leaf = logits.clone().requires_grad_()
    mean = (leaf / tau).softmax(-1).mean(0)
    (gradient,) = torch.autograd.grad((gather(mean, labels) - gather(mean, others)).sum(), leaf)
    return sign * gather(gradient, moved)


@pytest.mark.parametrize("tau", TAUS)
def test_the_default_weight_is_the_true_derivative_of_eq_10(tau: float) -> None:
    logits, labels, others = problem()
    closed = log_reweighing(logits / tau, labels, others).exp() / (tau * len(logits))
    torch.testing.assert_close(closed, derivative(logits, labels, others, tau, labels, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tau", TAUS)
def test_the_runner_up_weight_is_the_derivative_through_the_other_class(tau: float) -> None:
    logits, labels, others = problem()
    closed = log_reweighing(logits / tau, labels, others, "runner-up").exp() / (tau * len(logits))
    torch.testing.assert_close(closed, derivative(logits, labels, others, tau, others, -1), rtol=1e-10, atol=1e-10)


def test_the_published_and_the_released_weights_are_as_written() -> None:
    logits, labels, others = problem()
    s, mean = logits.softmax(-1), logits.softmax(-1).mean(0)
    s_y, s_o, e_y, e_o = gather(s, labels), gather(s, others), gather(mean, labels), gather(mean, others)
    published = log_reweighing(logits, labels, others, "published").exp()
    torch.testing.assert_close(published, s_y * (1 + s_y - s_o), rtol=1e-10, atol=1e-12)
    code = log_reweighing(logits, labels, others, "code").exp()
    torch.testing.assert_close(code, s_o * ((1 + s_o) / e_o - s_y / e_y), rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_the_reweighed_mixture() -> None:
    """With weights and scales held constant, the loss is CE of a fixed linear mixture: check against it written plainly."""
    logits, labels, others = problem()
    leaf = logits.clone().requires_grad_()
    scores = leaf.softmax(-1).mean(0).log()
    (gradient,) = torch.autograd.grad(mora(leaf, scores, Goal(labels), beta=0.3, tau=1.0, vote=SOFTMAX).sum(), leaf)

    plain = logits.clone().requires_grad_()
    s = logits.softmax(-1)
    s_y, s_o = gather(s, labels), gather(s, others)
    weights = s_y * (1 - s_y + s_o) * (gather(logits, labels) > gather(logits, others))
    weights = weights / weights.sum(0)
    ensemble = plain.softmax(-1).mean(0).log()
    members = (weights.unsqueeze(-1) * plain).sum(0)
    mixture = 0.7 * ensemble / margin(ensemble, labels).detach().abs().unsqueeze(-1)
    mixture = mixture + 0.3 * members / margin(members, labels).detach().abs().unsqueeze(-1)
    (expected,) = torch.autograd.grad(ce(mixture, labels).sum(), plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", WEIGHT_RULES)
@pytest.mark.parametrize("masked", [True, False])
def test_weights_sum_to_one_and_masked_members_weigh_nothing(rule: str, masked: bool) -> None:
    logits, labels, others = problem()
    weights = reweigh(logits, labels, others, masked=masked, rule=rule)
    torch.testing.assert_close(weights.sum(0), torch.ones(40, dtype=torch.float64))
    wrong = gather(logits, labels) <= gather(logits, others)
    some_right = ~wrong.all(0)
    assert wrong.any()
    if masked:
        assert (weights[:, some_right][wrong[:, some_right]] == 0).all()


@pytest.mark.parametrize("rule", WEIGHT_RULES)
def test_confident_members_keep_their_order(rule: str) -> None:
    """In float32, s_y rounds to 1 for both members; the one nearer its boundary must still weigh (far) more."""
    logits = torch.tensor([[[60.0, 0.0, -5.0]], [[90.0, 0.0, -5.0]]])
    weights = reweigh(logits, torch.tensor([0]), torch.tensor([1]), masked=True, rule=rule)
    assert torch.isfinite(weights).all()
    if rule in ("derivative", "runner-up"):
        assert weights[0] > 0.999


@pytest.mark.parametrize("vote", [*VOTES, None])
@pytest.mark.parametrize("rule", WEIGHT_RULES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tau", [None, 0.1])
@pytest.mark.parametrize("classes", [2, 4])
def test_no_nan_at_the_edges(vote: str | None, rule: str, beta: float, tau: float | None, classes: int) -> None:
    """p = 1, zero margin, every weight zero, K = 2, huge logits: loss and gradient stay finite."""
    sure = torch.zeros(2, 1, classes)
    sure[..., 0] = 1e4
    equal = torch.zeros(2, 1, classes)
    all_wrong = torch.zeros(2, 1, classes)
    all_wrong[..., 1] = 30.0
    split = torch.zeros(2, 1, classes)
    split[0, 0, 0], split[1, 0, 1] = 40.0, 40.0
    logits = torch.cat([sure, equal, all_wrong, split], dim=1).requires_grad_()
    labels = torch.zeros(4, dtype=torch.long)
    chosen = Vote(OWN, mean_logits) if vote is None else AGGREGATES[vote]
    for targets in (None, torch.ones(4, dtype=torch.long)):
        loss = mora(logits, logits.mean(0), Goal(labels, targets), beta=beta, vote=chosen, tau=tau, rule=rule)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


def test_with_mean_logits_every_member_weighs_the_same() -> None:
    logits, labels, _ = problem()
    losses = [mora(logits, logits.mean(0), Goal(labels), beta=beta, vote=LOGITS) for beta in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])
    other = mora(logits, logits.mean(0), Goal(labels), beta=1.0, vote=LOGITS, rule="published")
    assert not torch.allclose(other, losses[0])


@pytest.mark.parametrize("vote", ["voting", "logits"])
def test_the_scale_of_the_logits_does_not_turn_the_gradient(vote: str) -> None:
    logits, labels, _ = problem()

    def direction(scale: float) -> Tensor:
        leaf = (scale * logits).requires_grad_()
        loss = mora(leaf, AGGREGATES[vote].aggregate(leaf), Goal(labels), beta=0.5, vote=AGGREGATES[vote])
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        return gradient / gradient.abs().max()

    torch.testing.assert_close(direction(1e-6), direction(1e-2))


def test_targeted_mora_climbs_towards_the_target_not_the_runner_up() -> None:
    logits, labels, others = problem()
    targets = (others + 1) % 5
    targets = torch.where(targets == labels, (targets + 1) % 5, targets)
    leaf = logits.clone().requires_grad_()
    loss = mora(leaf, leaf.softmax(-1).mean(0).log(), Goal(labels, targets), beta=0.5, vote=SOFTMAX)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    moved = logits + 1e-3 * gradient.sign()
    gap = lambda z: gather(z.softmax(-1).mean(0).log(), targets) - gather(z.softmax(-1).mean(0).log(), labels)  # noqa: E731
    assert (gap(moved) > gap(logits)).all()


def test_margin_and_dlr_on_known_scores() -> None:
    scores = torch.tensor([[5.0, 3.0, 1.0, 0.0]])
    label = torch.tensor([0])
    assert margin(scores, label).item() == 2.0
    assert margin(scores, torch.tensor([1])).item() == -2.0
    assert dlr(scores, label).item() == pytest.approx(-2 / 4)
    assert dlr_targeted(scores, label, torch.tensor([2])).item() == pytest.approx(-4 / 4.5)
    assert normalize_margin(scores, label)[0].tolist() == [2.5, 1.5, 0.5, 0.0]


@pytest.mark.parametrize("vote", ["softmax", "max", "decided", lambda logits: logits.softmax(-1).mean(0)])
def test_sure_members_are_not_lost_beside_an_unsure_one(vote: str | Callable[[Tensor], Tensor]) -> None:
    """The probabilities of those that are sure have no gradient, but they decide: the loss follows them all the same."""
    labels = torch.zeros(1, dtype=torch.long)
    logits = torch.tensor([[[40.0, 0, 0]], [[40.0, 0, 0]], [[1.0, 0, 0.5]]], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        scores = as_vote(vote).aggregate(logits)
    (gradient,) = torch.autograd.grad(mora(logits, scores, Goal(labels), beta=0.5, vote=as_vote(vote)).sum(), logits)
    of_members = gradient.abs().sum((1, 2)) * gaps(logits).flatten()  # relative to how sure they are
    assert of_members[:2].min() > 0.1 * of_members[2]


def test_the_temperature_is_one_where_no_member_is_sure() -> None:
    logits, labels, _ = problem(scale=0.2)
    scores = logits.softmax(-1).mean(0).log()
    losses = [mora(logits, scores, Goal(labels), beta=0.5, vote=SOFTMAX, tau=tau) for tau in (None, 1.0)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
