"""Turn the members' logits into an ensemble's scores.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.errors import unknown_name
from ensemble_attacks.scores import at_least

VOTING_TEMPERATURE = 0.1  # of the soft votes whose gradient hard votes pass on (MORA, section 2: tau = 0.1)
Aggregate = Callable[[Tensor], Tensor]  # (M, N, K) -> (N, K)


def log_mean_softmax(logits_MNK: Tensor) -> Tensor:
    """Return ``log mean_m softmax(z^m)``, (N, K), by log-sum-exp, which is finite wherever the logits are."""
    return logits_MNK.log_softmax(-1).logsumexp(0) - math.log(len(logits_MNK))


def log_expected_softmax(logits_MNK: Tensor, probabilities_M: Tensor) -> Tensor:
    """Return ``log sum_m p_m softmax(z^m)``, (N, K), the scores of a model that draws member m with probability p_m."""
    log_p_M = probabilities_M.to(logits_MNK).log().view(-1, 1, 1)
    return (logits_MNK.log_softmax(-1) + log_p_M).logsumexp(0)


def mean_logits(logits_MNK: Tensor) -> Tensor:
    """Return ``mean_m z^m``, (N, K)."""
    return logits_MNK.mean(0)


def log_votes(logits_MNK: Tensor) -> Tensor:
    """Return the logarithm of the hard votes' shares, (N, K), with ties broken by the mean probability.

    The value is ``log((votes + p / 2) / (M + 1/2))`` with ``p`` the mean probability: less than half a vote, so that it
    decides between equal counts and nothing else. The gradient is that of ``log mean_m softmax(z^m / 0.1)``, passed straight
    through.
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


@dataclass(frozen=True, eq=False)
class Vote:
    """A way to put members together, which also says what an attack has to know of it.

    Attributes:
        name: the name by which it is asked for.
        aggregate: the function from the members' logits (M, N, K) to the ensemble's scores (N, K).
        soft: what is differentiated in its place, a function of logits divided by a temperature; ``None``: the scores
            themselves are differentiated.
        own_gaps: whether that temperature is each member's gap between its two best logits, sample by sample, which follows
            a hard vote more closely than any fixed one; else it is 1.
        masked: whether members that prefer another class already cannot change the vote (MORA, the indicator of eq. 11).
        linear: whether every member moves the scores alike, by 1 / M.
        counted: whether answers are counted, so that counts may tie.
    """

    name: str
    aggregate: Aggregate
    soft: Aggregate | None = None
    own_gaps: bool = False
    masked: bool = True
    linear: bool = False
    counted: bool = False

    def temperature(self, logits_MNK: Tensor) -> float | Tensor:
        """Return the temperature of the members' softmax (MORA, eq. 10: tau): a number, or a tensor (M, N, 1)."""
        if not self.own_gaps:
            return 1.0
        top_MN2 = logits_MNK.topk(2, -1).values
        return at_least(top_MN2[..., 0] - top_MN2[..., 1], logits_MNK).unsqueeze(-1)

    def tied(self, logits_MNK: Tensor) -> Tensor:
        """Return the samples whose counts tie, (N,) bool."""
        if not self.counted:
            return torch.zeros(logits_MNK.shape[1], dtype=torch.bool, device=logits_MNK.device)
        counts_NK = F.one_hot(logits_MNK.argmax(-1), logits_MNK.shape[-1]).sum(0)
        return (counts_NK == counts_NK.amax(1, keepdim=True)).sum(1) > 1


SOFTMAX = Vote("softmax", log_mean_softmax, soft=log_mean_softmax)
VOTING = Vote("voting", log_votes, soft=log_mean_softmax, own_gaps=True, counted=True)
LOGITS = Vote("logits", mean_logits, masked=False, linear=True)
VOTES: dict[str, Vote] = {vote.name: vote for vote in (SOFTMAX, VOTING, LOGITS)}
OWN = "own"  # the name of a vote that has none


def check_vote(vote: str | Vote) -> Vote:
    """Return the vote of a name, or the `Vote` itself.

    Raises:
        ValueError: Where the name is unknown; the message names the nearest one.
    """
    if isinstance(vote, Vote):
        return vote
    if vote not in VOTES:
        raise unknown_name("vote", vote, VOTES)
    return VOTES[vote]


def as_vote(vote: str | Vote | Aggregate) -> Vote:
    """Return the `Vote` of a name, of a function (M, N, K) -> (N, K), or the `Vote` itself."""
    return Vote(OWN, vote) if callable(vote) else check_vote(vote)


def vote_of(model: Any) -> Vote:
    """Return the vote of a model with ``aggregate``: the one that it names, or a `Vote` that holds its aggregation."""
    vote = getattr(model, "vote", None)
    if isinstance(vote, Vote):
        return vote
    return VOTES[vote] if isinstance(vote, str) and vote in VOTES else Vote(OWN, model.aggregate)
