"""Implement ``trs``: Transferability Reduced Smooth training (Yang et al., "TRS: Transferability Reduced Ensemble via
Promoting Gradient Diversity and Model Smoothness", NeurIPS 2021).

It follows the released code: Adam, coefficients 2 (similarity), 2 (smoothness), 5 (both); smoothness on clean images, as its
CIFAR-10 script leaves out the flag that would perturb them.
"""

from __future__ import annotations

from torch import Tensor

from defenses.standard import cross_entropy_sum
from defenses.training import Batch, Recipe, adam, input_gradients, pair_cosines

SIMILARITY, SMOOTHNESS, SCALE = 2.0, 2.0, 5.0


def gradient_similarity(gradients_MN: Tensor) -> Tensor:
    """Return the mean of ``|cos(g_a, g_b)|`` over pairs of members, (N,), of gradients (M, N, ...) (Yang et al., L_sim)."""
    return pair_cosines(gradients_MN).abs().mean(0)


def smoothness(gradients_MN: Tensor) -> Tensor:
    """Return ``mean_m 2 |g_m|_2^2``, (N,), of input gradients (M, N, ...) (Yang et al., L_smooth)."""
    return 2 * gradients_MN.flatten(2).square().sum(-1).mean(0)


def loss(batch: Batch) -> Tensor:
    """Return ``sum_m CE + 5 (2 similarity + 2 smoothness)``, batch mean.

    Smoothness takes the gradients of the batch's mean cross-entropy, so that every image's carries 1 / N, as in the released
    code.
    """
    logits_MNK, gradients_MN = input_gradients(batch, batch.x)
    regulariser = SIMILARITY * gradient_similarity(gradients_MN) + SMOOTHNESS * smoothness(gradients_MN / len(batch.x))
    return cross_entropy_sum(logits_MNK, batch.y) + SCALE * regulariser.mean()


RECIPE = Recipe(
    name="trs",
    loss=loss,
    optimizer=adam,
    max_lr=4e-3,
    summary=f"Transferability Reduced Smooth training (Yang et al. 2021), similarity {SIMILARITY}, smoothness {SMOOTHNESS}, "
    f"scale {SCALE}; Adam, weight decay 1e-4.",
)
