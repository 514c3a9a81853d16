"""Implement ``adp``: Adaptive Diversity Promoting training (Pang et al., "Improving Adversarial Robustness via Promoting
Ensemble Diversity", ICML 2019), which spreads the members' non-true-class predictions apart.

The constants alpha = 2 and beta = 0.5 are those of the published code, which trains with Adam at 1e-3; the learning rate
here is that of `RECIPE`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.standard import cross_entropy_sum
from defenses.training import Batch, Recipe, adam

ALPHA, BETA = 2.0, 0.5


def ensemble_entropy(probabilities_MNK: Tensor) -> Tensor:
    """Return the Shannon entropy of the mean probability, (N,) in nats (Pang et al., eq. 4, first term)."""
    mean_NK = probabilities_MNK.mean(0)
    return -(mean_NK * mean_NK.clamp_min(1e-12).log()).sum(-1)


def log_ensemble_diversity(probabilities_MNK: Tensor, labels: Tensor) -> Tensor:
    """Return the logarithm of the ensemble diversity, (N,) (Pang et al., eq. 3).

    It is the log-determinant of the Gram matrix of the members' L2-normalised non-true-class probability vectors, with 1e-6
    on the diagonal against rank loss.
    """
    members, samples, classes = probabilities_MNK.shape
    others = F.one_hot(labels, classes).logical_not().expand(members, -1, -1)
    vectors_MNk = F.normalize(probabilities_MNK[others].view(members, samples, classes - 1), dim=-1, eps=1e-12)
    gram_NMM = torch.einsum("ank,bnk->nab", vectors_MNk, vectors_MNk)
    return torch.logdet(gram_NMM + 1e-6 * torch.eye(members, device=gram_NMM.device, dtype=gram_NMM.dtype))


def adp_loss(logits_MNK: Tensor, labels: Tensor, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """Return ``sum_m CE - alpha * H(mean p) - beta * log ED``, batch mean (Pang et al., eq. 5)."""
    probabilities_MNK = logits_MNK.softmax(-1)
    regulariser = alpha * ensemble_entropy(probabilities_MNK)
    regulariser = regulariser + beta * log_ensemble_diversity(probabilities_MNK, labels)
    return cross_entropy_sum(logits_MNK, labels) - regulariser.mean()


def loss(batch: Batch) -> Tensor:
    return adp_loss(batch.logits(batch.x), batch.y)


RECIPE = Recipe(
    name="adp",
    loss=loss,
    optimizer=adam,
    max_lr=4e-3,
    summary=f"Adaptive Diversity Promoting (Pang et al. 2019), alpha {ALPHA}, beta {BETA}; Adam, weight decay 1e-4.",
)
