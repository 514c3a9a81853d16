"""The loop: which class a stage aims at."""

from __future__ import annotations

import torch
from helpers import make_ensemble
from torch import Tensor

from ensemble_attacks.descent import CLOSEST, Outputs, Stage, attack, closest_class
from ensemble_attacks.objectives import ce
from ensemble_attacks.steps import CosineSteps


def test_the_closest_of_the_classes_aimed_at_least() -> None:
    gaps = torch.tensor([[0.0, 3.0, 1.0, 2.0], [0.0, torch.nan, torch.inf, torch.inf]])
    label = 1000
    assert closest_class(gaps, torch.tensor([[label, 0, 0, 0]] * 2)).tolist() == [2, 1]
    assert closest_class(gaps, torch.tensor([[label, 0, 1, 0]] * 2)).tolist() == [3, 1]
    assert closest_class(gaps, torch.tensor([[label, 1, 2, 1]] * 2)).tolist() == [3, 1]


def test_stages_aim_at_every_class_before_any_a_second_time(batch: tuple[Tensor, Tensor]) -> None:
    images, _ = batch
    model = make_ensemble()
    labels = model(images).argmax(1)
    aimed: list[Tensor] = []

    def objective(outputs: Outputs, labels: Tensor, targets: Tensor | None) -> Tensor:
        assert targets is not None
        aimed.append(targets)
        return -ce(outputs.scores_NK, targets)

    stages = [Stage(objective, target_rank=CLOSEST, restart=0)] * 4
    attack(
        lambda x: Outputs(model(x)),
        images,
        labels,
        lambda num_classes: stages,
        norm="Linf",
        eps=1e-6,
        steps=1,
        step_rule=CosineSteps,
        seed=0,
    )
    aimed = [targets.sort().values for targets in aimed]  # samples are ordered by margin, which moves a little
    assert len(aimed) == 4
    assert torch.equal(aimed[0], aimed[3])
    counts = sum(torch.bincount(targets, minlength=4) for targets in aimed[:3])
    assert torch.equal(counts, len(images) - torch.bincount(labels, minlength=4))
    assert torch.equal(aimed[0], model(images).topk(2).indices[:, 1].sort().values)
