"""Attacks on models that are random: expectation over draws, exact where the members are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defenses.randomized import RandomizedEnsemble
from ensemble_attacks import APGD, ARC, EOTAPGD, MORA, PGD, Expected, NotAnEnsembleError, Surrogate, judge
from ensemble_attacks.attacks.mora import mora
from ensemble_attacks.descent.look import CONFIRMING, Draws, expected_margin, look
from ensemble_attacks.descent.objectives import Goal, cross_entropy, of_scores
from ensemble_attacks.descent.stages import Trace
from ensemble_attacks.evaluation.runner import evaluate
from ensemble_attacks.evaluation.suite import Settings
from ensemble_attacks.hosts.original import run_autoattack
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.models.votes import OWN, SOFTMAX, Vote
from tests.helpers import make_ensemble, make_member

EPS = 0.1


class Flipping(nn.Module):
    """A model that no perturbation fools, and that answers another class with probability 5%."""

    def __init__(self, rate: float = 0.05) -> None:
        super().__init__()
        self.rate, self.passes, self.largest = rate, 0, 0
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes, self.largest = self.passes + 1, max(self.largest, len(x))
        score = x.flatten(1).mean(1, keepdim=True) * 0.01 + 1 + self.weight
        scores = torch.cat([score, -score, -score], dim=1)
        flipped = torch.rand(len(x), 1) < self.rate
        return torch.where(flipped, scores.roll(1, 1), scores)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    return torch.rand(300, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(300, dtype=torch.long)


def test_lucky_draws_are_no_success(images: tuple[Tensor, Tensor]) -> None:
    """A label flipped in 5% of draws is worth 95%, however often an attacker looks; AutoAttack's rand says 84.5%."""
    x, y = images
    model = Flipping()
    adversarial = EOTAPGD(model, eps=EPS, steps=20)(x, y)
    verdict = judge(model, x, y, adversarial, eps=EPS, draws=20)
    low, high = verdict.interval
    assert low <= 0.95 <= high
    assert int(verdict.robust.sum()) == len(x)


def test_what_rand_says_of_lucky_draws(images: tuple[Tensor, Tensor]) -> None:
    """Why there is EOTAPGD: AutoAttack's own flags count one lucky draw of an image as a success."""
    x, y = images
    adversarial, flags = run_autoattack(Flipping(), x, y, eps=EPS, version="rand", steps=20)
    assert flags["apgd-dlr"].double().mean() < 0.9
    assert 0.92 < judge(Flipping(), x, y, adversarial, eps=EPS, draws=20).accuracy < 0.98


def test_square_on_the_expectation_is_not_taken_in_by_lucky_draws(images: tuple[Tensor, Tensor]) -> None:
    x, y = images[0][:50], images[1][:50]
    kept = {}
    for draws in (1, 9):
        _, flags = run_autoattack(Expected(Flipping(), draws=draws), x, y, eps=EPS, attacks=["square"], steps=10)
        kept[draws] = flags["square"].sum()
    assert kept[9] == 50 > kept[1]  # of as many queries
    with pytest.raises(ValueError, match="draws must be at least 1"):
        Expected(Flipping(), draws=0)


@pytest.mark.slow
def test_square_is_not_taken_in_by_all_its_queries(images: tuple[Tensor, Tensor]) -> None:
    x, y = images[0][:50], images[1][:50]
    _, flags = run_autoattack(Expected(Flipping(), draws=9), x, y, eps=EPS, attacks=["square"])
    assert flags["square"].all()


@pytest.mark.slow
def test_gradient_free_controls(batch: tuple[Tensor, Tensor]) -> None:
    model = make_randomized()
    x, y = agreed(model, batch)
    settings = Settings(eps=3 * EPS, draws=20, eot_iter=5)
    summary = evaluate(model.float(), x[:4].float(), y[:4], ["eot-square", "zero-order-pgd"], settings)
    assert all(row["accuracy"] < 0.9 for row in summary["attacks"].values())


def test_evaluate_a_random_model(batch: tuple[Tensor, Tensor]) -> None:
    model = make_randomized()
    x, y = agreed(model, batch)
    settings = Settings(eps=EPS, draws=40, eot_iter=3)
    summary = evaluate(model.float(), x.float(), y, ["arc", "mora", "eot-apgd"], settings)
    assert summary["clean"]["accuracy"] == 1
    rows = summary["attacks"].values()
    assert all(row["draws"] == 40 and row["accuracy"] < 1 for row in rows)
    assert summary["worst_case"]["accuracy"] <= min(row["accuracy"] for row in rows)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        evaluate(model, x.float(), y, ["mora"], Settings(eps=EPS, draws=0))


def test_a_mistake_is_told_before_anything_runs(batch: tuple[Tensor, Tensor]) -> None:
    ran: list[str] = []
    for attack, message in (("arc", "no tensor called probabilities"), ("bpda", "'frontend' is no part of Ensemble")):
        with pytest.raises((TypeError, ValueError), match=message):
            evaluate(
                make_ensemble(),
                *batch,
                ["pgd", attack],
                Settings(eps=EPS),
                report=lambda name, row: ran.append(name),
            )
    assert not ran


def test_the_seed_decides_on_draws_of_the_models_own(batch: tuple[Tensor, Tensor]) -> None:
    model, other = make_randomized(), make_randomized()
    other.own_draws(7)
    x, y = batch
    first = judge(model, x, y, x, eps=EPS, draws=5)
    assert torch.equal(first.correct, judge(other, x, y, x, eps=EPS, draws=5).correct)
    before = other.generator.get_state()
    blind = [PGD(net, eps=EPS, steps=3, n_restarts=1)(x, y) for net in (model, other)]
    assert torch.equal(*blind)
    assert torch.equal(other.generator.get_state(), before)


def test_the_expected_vote_is_what_mora_attacks(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = make_randomized()
    logits = model.member_logits(x)
    arguments: dict[str, Any] = dict(beta=0.0, probabilities=model.probabilities)
    votes = (SOFTMAX, Vote(OWN, model.aggregate))
    losses = [mora(logits, model.aggregate(logits), Goal(y), vote=vote, **arguments) for vote in votes]
    assert torch.equal(*losses)


def test_memory_does_not_grow_with_the_draws(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model = Flipping()
    EOTAPGD(model, eps=EPS, steps=2, eot_iter=50)(x, y)
    assert model.largest == len(x)
    few, many = Flipping(), Flipping()
    EOTAPGD(few, eps=EPS, steps=2, eot_iter=12)(x[:10], y[:10])
    EOTAPGD(many, eps=EPS, steps=2, eot_iter=12, draws_per_pass=5)(x[:10], y[:10])
    assert many.largest == 50
    assert many.passes < few.passes / 3


def test_a_point_is_the_mean_over_draws(images: tuple[Tensor, Tensor]) -> None:
    x, y = images[0][:6], images[1][:6]
    calls: list[Tensor] = []

    def forward(batch: Tensor) -> Outputs:
        calls.append(batch)
        scores = torch.stack([batch.mean((1, 2, 3)) * len(calls), torch.zeros(len(batch))], dim=1)
        return Outputs(scores)

    point = look(forward, x, Goal(y), of_scores(cross_entropy), Draws(3))
    means = x.mean((1, 2, 3))
    torch.testing.assert_close(point.scores_NK[:, 0], means * 2)  # the mean of one, two and three times
    expected = torch.stack([nn.functional.softplus(-means * k) for k in (1, 2, 3)]).mean(0)
    torch.testing.assert_close(point.loss_N, expected)
    assert (point.forwards, point.backwards, len(calls)) == (18, 18, 3)
    assert point.gradient is not None
    assert (point.margin_N > 0).all()


def test_samples_are_ordered_by_the_probability_of_being_right() -> None:
    right = torch.tensor([0.0, 0.0, 0.05, 0.05, 1.0])
    margin = torch.tensor([-9.0, -0.1, -50.0, 40.0, -1.0])
    order = expected_margin(right, margin)
    assert (order.diff() > 0).all()
    assert (order < 0).tolist() == [True, True, False, False, False]


def test_a_sample_leaves_when_no_draw_is_right(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    always = Flipping(rate=1.0)
    assert torch.equal(EOTAPGD(always, eps=EPS, steps=20, eot_iter=3)(x, y), x)
    assert always.passes == 3 + 3 + CONFIRMING  # the first three tell how many classes there are


def make_randomized(**options: Any) -> RandomizedEnsemble:
    members = [make_member(4, seed) for seed in range(2)]
    return RandomizedEnsemble(members, (0.7, 0.3), seed=0, **options).double().eval()


def agreed(model: RandomizedEnsemble, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The images that every member gives the same class, and that class."""
    predicted = model.member_logits(batch[0]).argmax(-1)
    same = (predicted == predicted[0]).all(0)
    return batch[0][same], predicted[0][same]


@pytest.mark.parametrize("per", ["image", "batch"])
def test_one_member_answers(per: str, batch: tuple[Tensor, Tensor]) -> None:
    model = make_randomized(per=per)
    x = batch[0]
    logits = model.member_logits(x)
    own = torch.stack([model(x) for _ in range(200)])
    by_first = torch.isclose(own, logits[0]).all(-1)
    assert (by_first | torch.isclose(own, logits[1]).all(-1)).all()
    assert by_first.double().mean().item() == pytest.approx(0.7, abs=0.1)
    assert (by_first.all(1) | (~by_first).all(1)).all() == (per == "batch")
    with model.frozen_noise():
        assert torch.equal(model(x), model(x))
    assert not all(torch.equal(model(x), model(x)) for _ in range(20))


@pytest.mark.parametrize("attack", [EOTAPGD, MORA], ids=["eotapgd", "mora"])
def test_expectation_over_known_members_is_exact(attack: type[APGD], batch: tuple[Tensor, Tensor]) -> None:
    """No member is drawn; and the expected accuracy is lower than what an attack on single draws leaves."""
    model = make_randomized()
    x, y = agreed(model, batch)
    before = model.generator.get_state()
    adversarial = attack(model, eps=EPS, steps=10)(x, y)
    assert torch.equal(model.generator.get_state(), before)
    blind = PGD(model, eps=EPS, steps=10, n_restarts=1)(x, y)
    exact = expected_accuracy(model, adversarial, y)
    assert exact < expected_accuracy(model, blind, y)
    assert exact < 0.6
    drawn = judge(model, x, y, adversarial, eps=EPS, draws=200)
    assert drawn.accuracy == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("attack", [EOTAPGD, MORA], ids=["eotapgd", "mora"])
def test_members_that_are_random_themselves_are_drawn(attack: type[APGD], images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    made = attack(RandomizedEnsemble([Flipping(0.3), Flipping(0.3)]).eval(), eps=EPS, steps=5, eot_iter=10)
    made.trace = Trace()
    made(x, y)
    assert made.trace.rows()[-1]["robust"] == len(x)


def expected_accuracy(model: RandomizedEnsemble, x: Tensor, y: Tensor) -> float:
    return ((model.member_logits(x).argmax(-1) == y).double().mean(1) @ model.probabilities).item()


class Half(nn.Module):
    """A linear classifier of two pixels: class 0 where ``w . x < bound``."""

    def __init__(self, w: tuple[float, float], bound: float) -> None:
        super().__init__()
        self.w, self.bound = nn.Parameter(torch.tensor(w)), bound

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w - self.bound
        return torch.stack([-score, score], dim=1)


def test_arc_finds_what_the_mean_gradient_misses() -> None:
    """Two members with boundaries on opposite sides: their gradients cancel. ARC fools the likelier one."""
    model = RandomizedEnsemble([Half((1.0, 0.0), 0.6), Half((-1.0, 0.0), -0.45)], (0.6, 0.4), seed=0).eval()
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.long)
    assert expected_accuracy(model, x, y) == 1
    assert expected_accuracy(model, ARC(model, eps=0.2)(x, y), y) == pytest.approx(0.4)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_arc_on_a_randomized_ensemble(norm: str, batch: tuple[Tensor, Tensor]) -> None:
    model = make_randomized()
    x, y = agreed(model, batch)
    eps = EPS if norm == "Linf" else 5 * EPS
    adversarial = ARC(model, norm=norm, eps=eps)(x, y)
    judge(model, x, y, adversarial, eps=eps, norm=norm)
    adaptive = PGD(Surrogate(model, "probability"), norm=norm, eps=eps, steps=40, n_restarts=1)(x, y)
    assert expected_accuracy(model, adversarial, y) <= expected_accuracy(model, adaptive, y) + 0.02
    assert expected_accuracy(model, adversarial, y) < 0.9


def test_arc_needs_probabilities() -> None:
    with pytest.raises(NotAnEnsembleError, match="no tensor called probabilities"):
        ARC(make_ensemble())


@pytest.mark.parametrize(
    ("probabilities", "message"),
    [((0.5, 0.6), "sum to 1.1"), ((1.0,), "1 numbers for 2 members"), ((1.5, -0.5), "at least 0")],
)
def test_probabilities_are_checked(probabilities: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomizedEnsemble([make_member(), make_member()], probabilities)


def test_no_draws_are_an_error() -> None:
    with pytest.raises(ValueError, match="eot_iter must be at least 1, got 0"):
        EOTAPGD(make_ensemble(), eot_iter=0)
