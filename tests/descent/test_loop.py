"""The loop: where a stage starts, which samples it takes, which class it aims at."""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from ensemble_attacks import MORA, Ensemble
from ensemble_attacks.descent import progress
from ensemble_attacks.descent.loop import attack
from ensemble_attacks.descent.objectives import Goal, cross_entropy, of_scores
from ensemble_attacks.descent.progress import closest_class
from ensemble_attacks.descent.stages import CLOSEST, Stage, Trace
from ensemble_attacks.descent.steps import ConstantSteps, CosineSteps
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.scores import margin
from tests.helpers import make_ensemble

EPS = 0.03


def test_the_closest_of_the_classes_aimed_at_least() -> None:
    gaps = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, torch.nan, torch.inf, torch.inf]])
    label = 1000
    assert closest_class(gaps, torch.tensor([[label, 0, 0, 0]] * 2)).tolist() == [2, 1]
    assert closest_class(gaps, torch.tensor([[label, 0, 1, 0]] * 2)).tolist() == [3, 1]
    assert closest_class(gaps, torch.tensor([[label, 1, 2, 1]] * 2)).tolist() == [3, 1]


def targets_of(lengths: list[int], images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The classes that stages of so many steps aim at, sorted: samples are ordered by margin, which moves a little; and the
    labels."""
    model = make_ensemble()
    labels = model(images).argmax(1)
    aimed: list[Tensor] = []

    def objective(outputs: Outputs, goal: Goal) -> Tensor:
        assert goal.reach is not None
        aimed.append(goal.reach.sort().values)
        return cross_entropy(outputs.scores_NK, goal)

    stages = [Stage(objective, target_rank=CLOSEST, steps=steps) for steps in lengths]
    attack(
        lambda x: Outputs(model(x)),
        images,
        Goal(labels),
        stages,
        norm="Linf",
        eps=1e-6,
        steps=99,
        step_rule=CosineSteps,
        seed=0,
    )
    return [aimed[first] for first in accumulate([0, *lengths[:-1]])], labels


def test_stages_aim_at_every_class_before_any_a_second_time(batch: tuple[Tensor, Tensor]) -> None:
    images, _ = batch
    aimed, labels = targets_of([3] * 4, images)
    assert len(aimed) == 4
    assert torch.equal(aimed[0], aimed[3])
    counts = torch.stack([torch.bincount(targets, minlength=4) for targets in aimed[:3]]).sum(0)
    assert torch.equal(counts, len(images) - torch.bincount(labels, minlength=4))
    assert torch.equal(aimed[0], make_ensemble()(images).topk(2).indices[:, 1].sort().values)


def test_a_short_stage_counts_as_an_aim_among_the_short_alone(batch: tuple[Tensor, Tensor]) -> None:
    short, long = 2, 3
    aimed = targets_of([short, short, long, long, short], batch[0])[0]
    assert not torch.equal(aimed[0], aimed[1])
    assert torch.equal(aimed[2], aimed[0])
    assert torch.equal(aimed[3], aimed[1])
    assert not any(torch.equal(aimed[4], before) for before in aimed[:4])


@pytest.mark.parametrize(("steps", "lengths"), [(100, [28] + [12] * 6), (40, [10] + [5] * 6), (39, [39]), (1, [1])])
def test_mora_spends_the_first_betas_steps_in_parts(steps: int, lengths: list[int]) -> None:
    attack = MORA(make_ensemble(), steps=steps, betas=(0.5, 0.0))
    assert attack.sweep() == [*((0.5, length) for length in lengths), (0.0, steps)]
    attack.set_mode_targeted_by_label(quiet=True)
    assert attack.sweep() == [(0.5, steps), (0.0, steps)]
    assert MORA(make_ensemble(), steps=steps, betas=(0.5, 0.0), aimed=False).sweep() == [(0.5, steps), (0.0, steps)]


class Watched(Ensemble):
    """Keeps what it is asked."""

    def member_logits(self, x: Tensor) -> Tensor:
        self.asked = [*getattr(self, "asked", []), x.detach().clone()]
        return super().member_logits(x)


@pytest.mark.parametrize("moved", [0.0, EPS / 3])
def test_mora_opens_where_the_scores_have_been_seen(moved: float, batch: tuple[Tensor, Tensor]) -> None:
    """At the clean images, or at the caller's: one pass gives the scores and the first gradient."""
    images, labels = batch
    model = Watched(list(make_ensemble().members)).eval()
    start = (images + moved).clamp(0, 1) if moved else None
    attack = MORA(count_passes(model), eps=EPS, steps=40)
    attack.trace = Trace()
    attack(images, labels, start)
    begun = images if start is None else start
    checks = [len(x) for x in model.asked].index(2) + 2  # that the model is the ensemble it shows, and how many classes
    asked = model.asked[checks:]
    assert torch.equal(asked[0], images)
    assert start is None or torch.equal(asked[1], start)
    robust = model(begun).argmax(1) == labels
    x = begun[robust].requires_grad_()
    outputs = Outputs(model.aggregate(logits := model.member_logits(x)), logits)
    (gradient,) = torch.autograd.grad(attack._loss(0.5, outputs, Goal(labels[robust])).sum(), x)
    first = (x + 2 * EPS * gradient.sign()).clamp(images[robust] - EPS, images[robust] + EPS).clamp(0, 1)
    second = asked[1 if start is None else 2]
    order = second.flatten(1).sum(1).argsort()
    torch.testing.assert_close(second[order], first[first.flatten(1).sum(1).argsort()], rtol=0, atol=1e-9)
    surveys = 1 if start is None else 2
    rows = attack.trace.rows()
    assert [rows[0][kind] for kind in ("forwards", "backwards")] == [surveys * len(images), len(images)]
    assert [rows[1][kind] for kind in ("fooled", "forwards", "backwards")] == [0, 0, 0]
    assert sum(row["forwards"] for row in rows) == attack.model.forwards
    assert sum(row["backwards"] for row in rows) == attack.model.backwards


def run(stages: list[Stage], images: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    model = make_ensemble()
    step_rule = partial(ConstantSteps, share=0.3)
    arguments: dict[str, Any] = dict(norm="Linf", eps=eps, steps=steps, step_rule=step_rule, seed=0)
    return attack(lambda x: Outputs(model(x)), images, Goal(labels), stages, **arguments)


raise_ce = of_scores(cross_entropy)


def test_a_resumed_stage_goes_on_where_the_last_one_ended(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    whole = run([Stage(raise_ce)], images, labels, eps=0.03, steps=6)
    parts = [Stage(raise_ce, steps=2), Stage(raise_ce, steps=1, resume=True), Stage(raise_ce, steps=3, resume=True)]
    torch.testing.assert_close(run(parts, images, labels, eps=0.03, steps=99), whole, rtol=0, atol=1e-12)


def test_a_share_is_that_of_the_smallest_margins(batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = batch
    seen: list[int] = []

    def objective(outputs: Outputs, goal: Goal) -> Tensor:
        seen.append(len(goal.leave))
        return cross_entropy(outputs.scores_NK, goal)

    monkeypatch.setattr(progress, "FEWEST", 10)
    stages = [Stage(objective, share=share) for share in (0.5, 0.1)]
    stages.append(Stage(objective, resume=True))
    moved = run(stages, images, labels, eps=1e-6, steps=1) != images
    assert seen == [32, 10, 10]
    order = margin(make_ensemble()(images), labels).argsort()
    assert set(torch.nonzero(moved.flatten(1).any(1)).flatten().tolist()) <= set(order[:32].tolist())


def test_directions_are_the_samples_own(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    seen: list[Tensor] = []

    def direction(noise: Tensor, labels: Tensor, ranked: Tensor) -> Tensor:
        assert noise.abs().max() <= 1
        assert ranked.shape == (len(labels), 3)
        assert not (ranked == labels[:, None]).any()
        seen.append(noise)
        return noise

    def along(outputs: Outputs, goal: Goal) -> Tensor:
        assert goal.direction is not None
        return (outputs.scores_NK * goal.direction).sum(1)

    for part in (slice(0, 1), slice(0, 5)):
        run([Stage(along, direction=direction)], images[part], labels[part], eps=1e-6, steps=1)
    assert any(torch.equal(row, seen[0][0]) for row in seen[1])
    assert len({tuple(row.tolist()) for row in seen[1]}) == 5


def test_a_clean_image_without_scores_can_be_attacked(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = make_ensemble()
    scores = lambda x: torch.where((x == images[: len(x)]).all(), torch.nan, model(x))  # noqa: E731
    trace = Trace()
    adversarial = attack(
        lambda x: Outputs(scores(x)),
        images,
        Goal(labels),
        [Stage(of_scores(cross_entropy))],
        norm="Linf",
        eps=0.3,
        steps=10,
        step_rule=CosineSteps,
        seed=0,
        trace=trace,
    )
    fooled = int((model(adversarial).argmax(1) != labels).sum())
    assert fooled == len(images) - trace.rows()[-1]["robust"]
    assert fooled > len(images) / 2
