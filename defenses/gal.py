"""Implement ``gal``: Gradient Alignment Loss (Kariyappa & Qureshi, "Improving Adversarial Robustness of Ensembles with
Diversity Training", arXiv:1901.09981), which turns the members' input gradients away from each other.

It follows the code released with DVERGE: Adam, members with leaky ReLU (slope 0.1), Gaussian noise of 0.045 with probability
1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.training import Batch, Recipe, adam, input_gradients, pair_cosines

COEFFICIENT = 0.5
NOISE, NOISE_SHARE = 0.045, 0.5
NEGATIVE_SLOPE = 0.1
NAME = "gal"


def coherence(gradients_MN: Tensor) -> Tensor:
    """Return ``log sum_{a<b} exp(cos(g_a, g_b))``, (N,): the smooth maximum of the cosines between members' input gradients.

    It is the "GAL" regulariser of Kariyappa & Qureshi, section 4, for gradients (M, N, ...). Its least value is
    ``log(pairs) - 1``, where all oppose.
    """
    return pair_cosines(gradients_MN).logsumexp(0)


def loss(batch: Batch) -> Tensor:
    """Return ``mean_m CE + 0.5 * coherence``, batch mean."""
    noisy = torch.rand((), generator=batch.generator) < NOISE_SHARE
    noise = torch.randn(batch.x.shape, generator=batch.generator) * NOISE * noisy
    logits_MNK, gradients_MN = input_gradients(batch, batch.x + noise.to(batch.x))
    cross_entropy = F.cross_entropy(logits_MNK.flatten(0, 1), batch.y.repeat(len(logits_MNK)))
    return cross_entropy + COEFFICIENT * coherence(gradients_MN).mean()


RECIPE = Recipe(
    name=NAME,
    loss=loss,
    optimizer=adam,
    max_lr=4e-3,
    negative_slope=NEGATIVE_SLOPE,
    summary=f"Gradient Alignment Loss (Kariyappa & Qureshi 2019), coefficient {COEFFICIENT}; Adam, weight decay 1e-4, leaky "
    f"ReLU {NEGATIVE_SLOPE}, Gaussian input noise {NOISE} with probability {NOISE_SHARE}.",
)
