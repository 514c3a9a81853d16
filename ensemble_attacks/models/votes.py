"""How members' logits become an ensemble's scores.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.errors import unknown_name

VOTING_TEMPERATURE = 0.1  # of the soft votes whose gradient hard votes pass on (MORA, section 2: tau = 0.1)


def log_mean_softmax(logits_MNK: Tensor) -> Tensor:
    """``log mean_m softmax(z^m)``, (N, K), by log-sum-exp: finite wherever the logits are."""
    return logits_MNK.log_softmax(-1).logsumexp(0) - math.log(len(logits_MNK))


def log_expected_softmax(logits_MNK: Tensor, probabilities_M: Tensor) -> Tensor:
    """``log sum_m p_m softmax(z^m)``, (N, K): of a model that draws member m with probability p_m."""
    log_p_M = probabilities_M.to(logits_MNK).log().view(-1, 1, 1)
    return (logits_MNK.log_softmax(-1) + log_p_M).logsumexp(0)


def mean_logits(logits_MNK: Tensor) -> Tensor:
    """``mean_m z^m``, (N, K)."""
    return logits_MNK.mean(0)


def log_votes(logits_MNK: Tensor) -> Tensor:
    """Logarithm of the hard votes' shares, (N, K), ties broken by mean probability.

    The value is ``log((votes + p / 2) / (M + 1/2))`` with ``p`` the mean probability: less than half a vote, so that it
    decides between equal counts and nothing else. The gradient is that of ``log mean_m softmax(z^m / 0.1)``, passed
    straight through.
    """
    members, _, classes = logits_MNK.shape
    with torch.no_grad():
        votes_NK = F.one_hot(logits_MNK.argmax(-1), classes).sum(0)
        log_half_p_NK = log_mean_softmax(logits_MNK) + math.log(0.5)
        hard_NK = torch.logaddexp(votes_NK.to(logits_MNK.dtype).log(), log_half_p_NK)
        hard_NK -= math.log(members + 0.5)
    if not (torch.is_grad_enabled() and logits_MNK.requires_grad):
        return hard_NK
    soft_NK = log_mean_softmax(logits_MNK / VOTING_TEMPERATURE)
    return hard_NK + (soft_NK - soft_NK.detach())


VOTES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": log_mean_softmax,
    "voting": log_votes,
    "logits": mean_logits,
}


def check_vote(vote: str) -> str:
    """Return ``vote``, or raise a ValueError that names the nearest known one."""
    if vote not in VOTES:
        raise unknown_name("vote", vote, VOTES)
    return vote


def _tied(logits_MNK: Tensor, vote: str | None) -> Tensor:
    """(N,) bool: where hard votes tie."""
    if vote != "voting":
        return torch.zeros(logits_MNK.shape[1], dtype=torch.bool, device=logits_MNK.device)
    counts_NK = F.one_hot(logits_MNK.argmax(-1), logits_MNK.shape[-1]).sum(0)
    return (counts_NK == counts_NK.amax(1, keepdim=True)).sum(1) > 1
