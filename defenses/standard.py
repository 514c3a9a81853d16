"""Implement ``standard``: members trained independently on cross-entropy, the baseline of every ensemble defense."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.training import Batch, Recipe, sgd


def cross_entropy_sum(logits_MNK: Tensor, labels: Tensor) -> Tensor:
    """Return ``sum_m CE(z^m, y)``, batch mean: no term couples the members, so this trains each as if alone."""
    return torch.stack([F.cross_entropy(logits_NK, labels) for logits_NK in logits_MNK]).sum()


def loss(batch: Batch) -> Tensor:
    return cross_entropy_sum(batch.logits(batch.x), batch.y)


RECIPE = Recipe(
    name="standard",
    loss=loss,
    optimizer=sgd,
    max_lr=0.2,
    summary="Independently trained members: cross-entropy, SGD with Nesterov momentum 0.9, weight decay 5e-4.",
)
