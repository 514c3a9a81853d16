"""Let one member, or few, answer for each image: the most decided, the first that is sure, those that a gate chooses.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_attacks.models.aggregations import straight_through, wants_gradient
from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.votes import MORE, Vote
from ensemble_attacks.validation import check_count

CHOOSING_TEMPERATURE = 0.1  # of the soft choice of a member, by probabilities


def confidence(logits_MNK: Tensor) -> Tensor:
    """Return the members' largest probability, (M, N)."""
    return logits_MNK.softmax(-1).amax(-1)


def _chosen(name: str, choose: Callable[[Tensor], Tensor], log_weights: Callable[[Tensor], Tensor]) -> Vote:
    """Return the vote of the member, (N,), that ``choose`` names; its soft form is an expectation over a soft choice.

    The temperature is that of the answers, not of the choice.
    """

    def soft(logits_MNK: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        return ((logits_MNK / temperature).log_softmax(-1) + log_weights(logits_MNK).unsqueeze(-1)).logsumexp(0)

    def aggregate(logits_MNK: Tensor) -> Tensor:
        chosen_N = choose(logits_MNK)
        scores_NK = logits_MNK.log_softmax(-1)[chosen_N, torch.arange(len(chosen_N), device=chosen_N.device)]
        return straight_through(scores_NK, soft(logits_MNK)) if wants_gradient(logits_MNK) else scores_NK

    return Vote(name, aggregate, soft=soft, masked=False, log_weights=log_weights)


DECIDED = _chosen(
    "decided",
    lambda logits_MNK: confidence(logits_MNK).argmax(0),
    lambda logits_MNK: (confidence(logits_MNK) / CHOOSING_TEMPERATURE).log_softmax(0),
)
MORE[DECIDED.name] = DECIDED


def cascade(threshold: float) -> Vote:
    """Return the vote of the first member whose largest probability is at least ``threshold``, or else of the last one.

    All members are asked for the sake of the attack. In the soft form, member m answers with the probability
    ``s_m prod_{j < m} (1 - s_j)``, with s_m a sigmoid of its confidence less the threshold, and 1 for the last one.

    Raises:
        ValueError: Where the threshold is out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold!r}")

    def choose(logits_MNK: Tensor) -> Tensor:
        sure_MN = confidence(logits_MNK) >= threshold
        sure_MN[-1] = True
        return sure_MN.int().argmax(0)

    def log_weights(logits_MNK: Tensor) -> Tensor:
        lead_MN = (confidence(logits_MNK) - threshold) / CHOOSING_TEMPERATURE
        answers_MN = torch.cat([F.logsigmoid(lead_MN[:-1]), torch.zeros_like(lead_MN[-1:])])
        passes_MN = torch.cat([torch.zeros_like(lead_MN[:1]), F.logsigmoid(-lead_MN[:-1]).cumsum(0)])
        return answers_MN + passes_MN

    return _chosen("cascade", choose, log_weights)


def gated(gate: nn.Module, top: int | None = None) -> Vote:
    """Return the vote ``log sum_m g_m(x) softmax(z^m)`` of a mixture of experts, with g the softmax of a gate's scores.

    Args:
        gate: images (N, ...) -> scores (N, M), one for each member.
        top: how many of the members with the largest g answer, whose g are made to sum to 1; ``None``: all. The gradient is
            then that of all, passed straight through.

    Raises:
        TypeError, ValueError: Where ``top`` is no whole number of at least 1; at the first vote, where the gate has not one
            score for each member.
    """
    if top is not None:
        check_count("top", top)

    def joined(x: Tensor, logits_MNK: Tensor) -> Tensor:
        """Return the logarithm of the probability that a member is chosen, and says a class."""
        scores_NM = ask(gate, x, "gate")
        if scores_NM.shape[1] != len(logits_MNK):
            raise ValueError(f"the gate scores {scores_NM.shape[1]} members, there are {len(logits_MNK)}")
        return logits_MNK.log_softmax(-1) + scores_NM.log_softmax(-1).T.unsqueeze(-1)

    def log_weights(joint_MNK: Tensor) -> Tensor:
        return joint_MNK.logsumexp(-1)

    def soft(joint_MNK: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
        return ((joint_MNK / temperature).log_softmax(-1) + log_weights(joint_MNK).unsqueeze(-1)).logsumexp(0)

    def aggregate(joint_MNK: Tensor) -> Tensor:
        if top is None:
            return soft(joint_MNK)
        log_g_MN = log_weights(joint_MNK)
        kept = log_g_MN.topk(min(top, len(log_g_MN)), 0)
        rows_TNK = kept.indices.unsqueeze(-1).expand(-1, -1, joint_MNK.shape[-1])
        answers_TNK = joint_MNK.gather(0, rows_TNK) - kept.values.unsqueeze(-1)
        scores_NK = (answers_TNK + kept.values.log_softmax(0).unsqueeze(-1)).logsumexp(0)
        return straight_through(scores_NK, soft(joint_MNK)) if wants_gradient(joint_MNK) else scores_NK

    return Vote("gated", aggregate, soft=soft, masked=False, log_weights=log_weights, joined=joined, modules=(gate,))
