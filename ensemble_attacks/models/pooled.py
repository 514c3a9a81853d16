"""Put members together by order statistics, ranks, products, thresholds, or a network of its own.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ensemble_attacks.models.aggregations import TIE_BREAKER, log_expected_softmax, log_mean_softmax, shares
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.votes import EQUAL, LOGITS, MORE, VOTING, Vote, at_temperature, weighted
from ensemble_attacks.validation import check_count


def median_logits(logits_MNK: Tensor) -> Tensor:
    """Return the median over members of each class's logit, (N, K); the mean of the two middle ones of an even number."""
    ranked_MNK = logits_MNK.sort(0).values
    middle = len(ranked_MNK) // 2
    return ranked_MNK[middle] if len(ranked_MNK) % 2 else ranked_MNK[middle - 1 : middle + 1].mean(0)


def log_max_softmax(logits_MNK: Tensor) -> Tensor:
    """Return ``log max_m softmax(z^m)``, (N, K)."""
    return logits_MNK.log_softmax(-1).amax(0)


def log_product_softmax(logits_MNK: Tensor) -> Tensor:
    """Return ``log prod_m softmax(z^m)``, (N, K), a product of experts but for its constant (Hinton, 2002)."""
    return logits_MNK.log_softmax(-1).sum(0)


def borda(logits_MNK: Tensor) -> Tensor:
    """Return Borda's points, (N, K): the mean over members of the share of other classes that a class is ranked above."""
    ranks_MNK = logits_MNK.argsort(-1).argsort(-1)
    return ranks_MNK.to(logits_MNK.dtype).mean(0) / (logits_MNK.shape[-1] - 1)


def soft_borda(logits_MNK: Tensor) -> Tensor:
    """Return `borda` with a sigmoid of the difference for each comparison, (N, K), one member at a time."""
    pairs = [(z_NK.unsqueeze(-1) - z_NK.unsqueeze(-2)).sigmoid().sum(-1) for z_NK in logits_MNK]
    return (torch.stack(pairs).mean(0) - 0.5) / (logits_MNK.shape[-1] - 1)


MEDIAN = Vote("median", median_logits)
MAXIMUM = Vote("max", log_max_softmax, soft=at_temperature(log_max_softmax), masked=False)
PRODUCT = replace(LOGITS, name="product", aggregate=log_product_softmax)
BORDA = Vote("borda", borda, soft=at_temperature(soft_borda), least=0.0, masked=False, hard=True)
MORE.update({vote.name: vote for vote in (MEDIAN, MAXIMUM, PRODUCT, BORDA)})


def trimmed(cut: int = 1) -> Vote:
    """Return the vote by the mean over members of each class's logits without the ``cut`` largest and smallest.

    Raises:
        TypeError, ValueError: Where ``cut`` is no whole number of at least 1; at the first vote, where it leaves no member.
    """
    check_count("cut", cut)

    def trimmed_mean(logits_MNK: Tensor) -> Tensor:
        if len(logits_MNK) <= 2 * cut:
            raise ValueError(f"cut={cut} leaves none of {len(logits_MNK)} members: it must be less than half as many")
        return logits_MNK.sort(0).values[cut : len(logits_MNK) - cut].mean(0)

    return Vote("trimmed", trimmed_mean)


def abstaining(threshold: float, weights: Sequence[float] | None = None) -> Vote:
    """Return hard votes that abstain, as a class K more, where the best class has a smaller share than ``threshold``.

    The scores, (N, K + 1), are the logarithms of the shares, whose ties are broken by a millionth, and of the threshold.

    Args:
        threshold: the least share that answers, above 0 and at most 1.
        weights: a weight for each member; ``None``: all the same.

    Raises:
        ValueError: Where the threshold is out of range, or weights cannot be used.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold!r}")
    log_weights = None if weights is None else weighted("voting", weights).log_weights

    def own(logits_MNK: Tensor) -> Tensor | None:
        return None if log_weights is None else log_weights(logits_MNK)[:, 0].exp()

    def expected(logits_MNK: Tensor) -> Tensor:
        weights_M = own(logits_MNK)
        return log_mean_softmax(logits_MNK) if weights_M is None else log_expected_softmax(logits_MNK, weights_M)

    def with_threshold(scores_NK: Tensor) -> Tensor:
        return torch.cat([scores_NK, torch.full_like(scores_NK[:, :1], math.log(threshold - EQUAL))], 1)

    def aggregate(logits_MNK: Tensor) -> Tensor:
        log_shares_NK = shares(logits_MNK, own(logits_MNK)).log()
        return with_threshold(torch.logaddexp(log_shares_NK, expected(logits_MNK) + math.log(TIE_BREAKER)))

    def soft(seen_MNL: Tensor) -> Tensor:
        return with_threshold(expected(seen_MNL[..., :-1]))

    def seen(logits_MNK: Tensor) -> Tensor:
        """A member that abandons a class for its second one has brought the vote nearer to abstaining."""
        return torch.cat([logits_MNK, logits_MNK.topk(2, -1).values[..., 1:]], -1)

    members = None if weights is None else len(weights)
    named = replace(VOTING, name="abstaining", aggregate=aggregate, soft=at_temperature(soft), hard=True)
    return replace(named, log_weights=log_weights, seen=seen, members=members)


def stacked(network: nn.Module) -> Vote:
    """Return the vote of a network on the members' logits, one after another: (N, M * K) -> scores (N, K)."""

    def aggregate(logits_MNK: Tensor) -> Tensor:
        return ask(network, logits_MNK.transpose(0, 1).flatten(1), "stacked")

    return Vote("stacked", aggregate, masked=False, modules=(network,))
