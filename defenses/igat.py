"""Implement ``igat``: interactive global adversarial training (Deng & Mu, "Understanding and Improving Ensemble Adversarial
Defense", NeurIPS 2023), which goes on training an ensemble that another defense has trained.

What fools the whole ensemble is distributed among its members, each example to one of them, most likely to the one that is
best at it; and the worst error of any member on it is pushed down. Both are added to the loss of the defense itself.

The constants alpha = 5 and beta = 10 are those of the released code. It perturbs half of a batch by PGD-20; here the whole
batch is there twice, clean and by PGD-10, as in the other recipes. Its regulariser cuts probabilities off at 0.99, beyond
which it has no gradient; here it is exact.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses import adp, dverge
from defenses.training import Batch, Recipe, sgd
from defenses.training.ascent import pgd
from ensemble_attacks.models.votes import log_mean_softmax

ALPHA, BETA = 5.0, 10.0


def distributing_probabilities(members: int) -> Tensor:
    """Return the probability that an example goes to the member of each rank, (M,), the member that is worst at it first.

    It is ``2^r / (2^M - 1)`` for ranks r = 0, ..., M - 1 (Deng & Mu, section 5, the distributing rule), so that the member
    that is best at it gets more than half.
    """
    return 2.0 ** torch.arange(members) / (2**members - 1)


def distribute(logits_MNK: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return the member that each example is given to, (N,), drawn by its rank in probability of the true class."""
    samples = torch.arange(len(labels), device=labels.device)
    ranked_MN = logits_MNK.detach().log_softmax(-1)[:, samples, labels].argsort(0)
    probabilities = distributing_probabilities(len(logits_MNK))
    ranks = torch.multinomial(probabilities, len(labels), replacement=True, generator=generator).to(labels.device)
    return ranked_MN[ranks, samples]


def severest_weakness(logits_MNK: Tensor, labels: Tensor) -> Tensor:
    """Return ``-log(1 - max_m max_{c != y} p^m_c)``, (N,) (Deng & Mu, section 5, the regulariser).

    ``1 - p_c`` is the sum of all other probabilities, and its logarithm is taken as such, so that the worst errors keep
    their gradient.
    """
    log_p_MNK = logits_MNK.log_softmax(-1)
    true_NK = F.one_hot(labels, log_p_MNK.shape[-1]).bool()
    worst_MN = log_p_MNK.detach().masked_fill(true_NK, -torch.inf).argmax(-1, keepdim=True)
    others_MNK = log_p_MNK.scatter(-1, worst_MN, -torch.inf)
    return -others_MNK.logsumexp(-1).amin(0)


def interactive_loss(batch: Batch, alpha: float = ALPHA, beta: float = BETA) -> Tensor:
    """Return ``alpha CE(f_m, y) + beta R``, mean over the batch and its PGD images, 0 where the ensemble is right.

    m is the member that the example is distributed to, R `severest_weakness`.
    """
    x, y = torch.cat([batch.x, pgd(batch)]), batch.y.repeat(2)
    logits_MNK = batch.logits(x)
    hard_N = log_mean_softmax(logits_MNK).argmax(-1) != y
    own_NK = logits_MNK[distribute(logits_MNK, y, batch.generator), torch.arange(len(y), device=y.device)]
    losses_N = alpha * F.cross_entropy(own_NK, y, reduction="none") + beta * severest_weakness(logits_MNK, y)
    return (hard_N * losses_N).mean()


def with_interactive_training(recipe: Recipe) -> Recipe:
    """Return what goes on from a model of ``recipe``, by its own loss and the interactive one; it is ``<recipe>_igat``."""
    return replace(
        recipe,
        name=f"{recipe.name}_igat",
        loss=lambda batch: recipe.loss(batch) + interactive_loss(batch),
        optimizer=sgd,
        max_lr=0.01,
        start_from=recipe.name,
        summary=f"{recipe.summary} Then interactive global adversarial training (iGAT, Deng & Mu 2023), alpha {ALPHA}, beta "
        f"{BETA}, from the {recipe.name} ensemble; SGD with Nesterov momentum 0.9, weight decay 5e-4.",
    )


RECIPES = tuple(map(with_interactive_training, (adp.RECIPE, dverge.RECIPE)))
