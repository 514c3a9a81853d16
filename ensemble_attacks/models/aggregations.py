"""Compute an ensemble's scores from its members' logits: pure functions, (M, N, K) -> (N, K).

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.scores import at_least

VOTING_TEMPERATURE = 0.1  # of the soft votes whose gradient hard votes pass on (MORA, section 2: tau = 0.1)


def log_mean_softmax(logits_MNK: Tensor) -> Tensor:
    """Return ``log mean_m softmax(z^m)``, (N, K), by log-sum-exp, which is finite wherever the logits are."""
    return logits_MNK.log_softmax(-1).logsumexp(0) - math.log(len(logits_MNK))


def log_expected_softmax(logits_MNK: Tensor, probabilities_M: Tensor) -> Tensor:
    """Return ``log sum_m p_m softmax(z^m)``, (N, K), the scores of a model that draws member m with probability p_m."""
    log_p_M = probabilities_M.to(logits_MNK).log().view(-1, 1, 1)
    return (logits_MNK.log_softmax(-1) + log_p_M).logsumexp(0)


def gaps(logits_MNK: Tensor) -> Tensor:
    """Return by how much each member's best logit leads its second, sample by sample, (M, N, 1), with no gradient."""
    top_MN2 = logits_MNK.detach().topk(2, -1).values
    return at_least(top_MN2[..., 0] - top_MN2[..., 1], logits_MNK.detach()).unsqueeze(-1)


def log_soft_votes(logits_MNK: Tensor, probabilities_M: Tensor | None = None) -> Tensor:
    """Return ``log mean_m softmax(z^m / gap_m)``, (N, K): soft votes, each at its member's own gap, sample by sample.

    With ``probabilities_M``, it is the logarithm of their expectation. Every member says ``1`` of its best class and less of
    all others, however confident it is, so that, unlike hard votes, none loses its gradient.
    """
    scaled_MNK = logits_MNK / gaps(logits_MNK)
    return log_mean_softmax(scaled_MNK) if probabilities_M is None else log_expected_softmax(scaled_MNK, probabilities_M)


def mean_logits(logits_MNK: Tensor) -> Tensor:
    """Return ``mean_m z^m``, (N, K)."""
    return logits_MNK.mean(0)


def expected_logits(logits_MNK: Tensor, weights_M: Tensor) -> Tensor:
    """Return ``sum_m w_m z^m``, (N, K)."""
    return torch.einsum("m,mnk->nk", weights_M.to(logits_MNK), logits_MNK)


def log_votes(logits_MNK: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """Return the logarithm of the hard votes' shares, (N, K), with ties broken by the mean probability.

    The value is ``log((votes + p / 2) / (M + 1/2))`` with ``p`` the mean probability: less than half a vote, so that it
    decides between equal counts and nothing else. The gradient is that of ``log mean_m softmax(z^m / 0.1)``, passed straight
    through. With weights that sum to 1, it is ``log(sum_m w_m [m votes for k] + p / 1e6)``, and ``p`` the expected
    probability.
    """
    with torch.no_grad():
        hard_NK = _equal_votes(logits_MNK) if weights_M is None else _weighted_votes(logits_MNK, weights_M)
    if not wants_gradient(logits_MNK):
        return hard_NK
    soft_MNK = logits_MNK / VOTING_TEMPERATURE
    return straight_through(
        hard_NK, log_mean_softmax(soft_MNK) if weights_M is None else log_expected_softmax(soft_MNK, weights_M)
    )


def _equal_votes(logits_MNK: Tensor) -> Tensor:
    members, _, classes = logits_MNK.shape
    votes_NK = F.one_hot(logits_MNK.argmax(-1), classes).sum(0)
    log_half_p_NK = log_mean_softmax(logits_MNK) + math.log(0.5)
    return torch.logaddexp(votes_NK.to(logits_MNK.dtype).log(), log_half_p_NK) - math.log(members + 0.5)


def _weighted_votes(logits_MNK: Tensor, weights_M: Tensor) -> Tensor:
    tie_breaker_NK = log_expected_softmax(logits_MNK, weights_M) + math.log(TIE_BREAKER)
    return torch.logaddexp(shares(logits_MNK, weights_M).log(), tie_breaker_NK)


TIE_BREAKER = 1e-6  # what the expected probability counts beside weighted votes, whose differences can be small


def shares(logits_MNK: Tensor, weights_M: Tensor | None = None) -> Tensor:
    """Return which share of the members, or of their weights, votes for each class, (N, K)."""
    votes_MNK = F.one_hot(logits_MNK.argmax(-1), logits_MNK.shape[-1]).to(logits_MNK.dtype)
    return votes_MNK.mean(0) if weights_M is None else expected_logits(votes_MNK, weights_M)


def wants_gradient(logits: Tensor) -> bool:
    """Tell whether a gradient with respect to these logits, or images, will be asked for."""
    return torch.is_grad_enabled() and logits.requires_grad


def straight_through(values_NK: Tensor, soft_NK: Tensor) -> Tensor:
    """Return the values, with the gradient of their soft form (Bengio, Leonard & Courville, arXiv:1308.3432)."""
    soft_NK = soft_NK.to(values_NK.dtype)
    return values_NK.detach() + (soft_NK - soft_NK.detach())
