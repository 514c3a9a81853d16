"""The loop: where a stage starts, which samples it takes, which class it aims at."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import make_ensemble
from torch import Tensor

from ensemble_attacks import MORA, descent
from ensemble_attacks.descent import CLOSEST, Outputs, Stage, attack, closest_class
from ensemble_attacks.objectives import ce, margin
from ensemble_attacks.steps import ConstantSteps, CosineSteps


def test_the_closest_of_the_classes_aimed_at_least() -> None:
    gaps = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, torch.nan, torch.inf, torch.inf]])
    label = 1000
    assert closest_class(gaps, torch.tensor([[label, 0, 0, 0]] * 2)).tolist() == [2, 1]
    assert closest_class(gaps, torch.tensor([[label, 0, 1, 0]] * 2)).tolist() == [3, 1]
    assert closest_class(gaps, torch.tensor([[label, 1, 2, 1]] * 2)).tolist() == [3, 1]


def targets_of(stages: int, images: Tensor, *, stage_steps: int) -> tuple[list[Tensor], Tensor]:
    """The classes that stages of so many of three steps aim at, sorted: samples are ordered by margin, which moves a little;
    and the labels."""
    model = make_ensemble()
    labels = model(images).argmax(1)
    aimed: list[Tensor] = []

    def objective(outputs: Outputs, labels: Tensor, targets: Tensor | None) -> Tensor:
        assert targets is not None
        aimed.append(targets.sort().values)
        return -ce(outputs.scores_NK, targets)

    stage = Stage(objective, target_rank=CLOSEST, restart=0, steps=stage_steps)
    attack(
        lambda x: Outputs(model(x)),
        images,
        labels,
        lambda num_classes: [stage] * stages,
        norm="Linf",
        eps=1e-6,
        steps=3,
        step_rule=CosineSteps,
        seed=0,
    )
    return aimed[::stage_steps], labels


def test_stages_aim_at_every_class_before_any_a_second_time(batch: tuple[Tensor, Tensor]) -> None:
    images, _ = batch
    aimed, labels = targets_of(4, images, stage_steps=3)
    assert len(aimed) == 4
    assert torch.equal(aimed[0], aimed[3])
    counts = sum(torch.bincount(targets, minlength=4) for targets in aimed[:3])
    assert torch.equal(counts, len(images) - torch.bincount(labels, minlength=4))
    assert torch.equal(aimed[0], make_ensemble()(images).topk(2).indices[:, 1].sort().values)


def test_a_short_stage_does_not_count_as_an_aim(batch: tuple[Tensor, Tensor]) -> None:
    aimed, _ = targets_of(3, batch[0], stage_steps=2)
    assert torch.equal(aimed[0], aimed[1])
    assert torch.equal(aimed[0], aimed[2])


@pytest.mark.parametrize(("steps", "lengths"), [(100, [25, 25, 50]), (10, [2, 2, 6]), (3, [3]), (1, [1])])
def test_mora_spends_the_first_betas_steps_in_growing_parts(steps: int, lengths: list[int]) -> None:
    attack = MORA(make_ensemble(), steps=steps, betas=(0.5, 0.0))
    assert attack.sweep() == [*((0.5, length) for length in lengths), (0.0, steps)]
    attack.set_mode_targeted_by_label(quiet=True)
    assert attack.sweep() == [(0.5, steps), (0.0, steps)]
    assert MORA(make_ensemble(), steps=steps, betas=(0.5, 0.0), aimed=False).sweep() == [(0.5, steps), (0.0, steps)]


def run(stages: list[Stage], images: Tensor, labels: Tensor, eps: float, steps: int) -> Tensor:
    model = make_ensemble()
    step_rule = partial(ConstantSteps, share=0.3)
    arguments = dict(norm="Linf", eps=eps, steps=steps, step_rule=step_rule, seed=0)
    return attack(lambda x: Outputs(model(x)), images, labels, lambda num_classes: stages, **arguments)


def raise_ce(outputs: Outputs, labels: Tensor, targets: Tensor | None) -> Tensor:
    return ce(outputs.scores_NK, labels)


def test_a_resumed_stage_goes_on_where_the_last_one_ended(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    whole = run([Stage(raise_ce)], images, labels, eps=0.03, steps=6)
    parts = [Stage(raise_ce, steps=2), Stage(raise_ce, steps=1, resume=True), Stage(raise_ce, steps=3, resume=True)]
    torch.testing.assert_close(run(parts, images, labels, eps=0.03, steps=99), whole, rtol=0, atol=1e-12)


def test_a_share_is_that_of_the_smallest_margins(batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = batch
    seen: list[int] = []

    def objective(outputs: Outputs, labels: Tensor, targets: Tensor | None) -> Tensor:
        seen.append(len(labels))
        return ce(outputs.scores_NK, labels)

    monkeypatch.setattr(descent, "FEWEST", 10)
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

    def along(outputs: Outputs, labels: Tensor, targets: Tensor | None) -> Tensor:
        return (outputs.scores_NK * targets).sum(1)

    for part in (slice(0, 1), slice(0, 5)):
        run([Stage(along, direction=direction)], images[part], labels[part], eps=1e-6, steps=1)
    assert any(torch.equal(row, seen[0][0]) for row in seen[1])
    assert len({tuple(row.tolist()) for row in seen[1]}) == 5


def test_a_clean_image_without_scores_can_be_attacked(batch: tuple[Tensor, Tensor]) -> None:
    images, labels = batch
    model = make_ensemble()
    scores = lambda x: torch.where((x == images[: len(x)]).all(), torch.nan, model(x))  # noqa: E731
    trace = descent.Trace()
    adversarial = attack(
        lambda x: Outputs(scores(x)),
        images,
        labels,
        lambda num_classes: [Stage(lambda outputs, y, targets: ce(outputs.scores_NK, y))],
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
