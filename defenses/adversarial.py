"""Implement adversarial training (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018):
the recipes ``at`` and ``each_at``, and an addition to other recipes (`with_adversarial_training`).

It trains on PGD-10 images of the ensemble, or, in ``each_at`` and with DVERGE, of each member by itself.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from defenses import standard
from defenses.standard import cross_entropy_sum
from defenses.training import Batch, Recipe
from defenses.training.ascent import pgd


def loss_against_ensemble(batch: Batch) -> Tensor:
    """Return ``sum_m CE(f_m(x'), y)``, batch mean, at images x' that raise the ensemble's cross-entropy."""
    return cross_entropy_sum(batch.logits(pgd(batch)), batch.y)


def loss_against_members(batch: Batch) -> Tensor:
    """Return ``sum_m CE(f_m(x'_m), y)``, batch mean, at images x'_m that raise the member's own cross-entropy."""
    members = range(len(batch.ensemble.members))
    return cross_entropy_sum(torch.stack([batch.logits(pgd(batch, m), m) for m in members]), batch.y)


def with_adversarial_training(recipe: Recipe, *, each_member: bool = False) -> Recipe:
    """Return ``recipe`` with the loss on adversarial images added to its own; it is named ``<recipe>_at``."""
    adversarial = loss_against_members if each_member else loss_against_ensemble
    whose = "each member" if each_member else "the ensemble"
    return replace(
        recipe,
        name=f"{recipe.name}_at",
        loss=lambda batch: recipe.loss(batch) + adversarial(batch),
        summary=f"{recipe.summary} Plus cross-entropy on PGD-10 images of {whose}.",
    )


RECIPE = replace(
    standard.RECIPE,
    name="at",
    loss=loss_against_ensemble,
    summary="Adversarial training (Madry et al. 2018) on PGD-10 images of the ensemble; SGD with Nesterov momentum 0.9, "
    "weight decay 5e-4.",
)
EACH = replace(
    RECIPE,
    name="each_at",
    loss=loss_against_members,
    fewest_members=1,
    summary="Adversarial training (Madry et al. 2018) of each member on PGD-10 images of its own; SGD with Nesterov "
    "momentum 0.9, weight decay 5e-4.",
)
