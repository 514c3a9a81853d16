"""Define MORA's loss exactly as its paper writes it, and exactly as its authors' released code computes it (Yu, Gao, Xu,
NeurIPS 2022): `MORA.published` and `MORA.released`, to compare with what `mora` makes of them.

Shape suffixes: M members, J members and the ensemble, N samples, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_attacks.descent.objectives import Goal, ce, cross_entropy
from ensemble_attacks.descent.steps import CosineSteps
from ensemble_attacks.models.aggregations import VOTING_TEMPERATURE, log_mean_softmax, mean_logits
from ensemble_attacks.models.votes import LOGITS, SOFTMAX, VOTES, VOTING, Vote
from ensemble_attacks.scores import best_other, gather, margin

PUBLISHED_TAU = {SOFTMAX.name: 1.0, VOTING.name: VOTING_TEMPERATURE, LOGITS.name: 1.0}  # section 2 of the paper
RELEASED_SHARPNESS = {SOFTMAX.name: 0.2, VOTING.name: 0.8, LOGITS.name: 0.0}  # 1 / tau of the authors' scripts
RELEASED_SHARPENED = 10.0  # by how much the released code's votes are sharper than those it differentiates
ADDED = 1e-8  # to the sum of the released code's weights
LEAST = 1e-12  # gap that is divided by: the released code divides by 0


def check_written(vote: Vote, who: str) -> None:
    """Raise a `ValueError` unless the vote is one of the three of the paper, without weights."""
    if vote is not VOTES.get(vote.name):
        known = ", ".join(VOTES)
        raise ValueError(f"{who} knows the votes {known} without weights, not this {vote.name!r}: use MORA(model, ...)")


def published(
    logits_MNK: Tensor,
    scores_NK: Tensor,
    goal: Goal,
    *,
    beta: float,
    vote: Vote,
    tau: float | None = None,
) -> Tensor:
    """Return the loss of the paper, (N,) (eq. 7-12), of the ensemble's and the reweighed members' normalised outputs.

    The arguments are those of `mora`. Of the ensemble it takes the mean probability itself at ``tau``, by default 1, or 0.1
    under hard votes, or the mean logits. Where the text leaves room, eq. 12 is taken of the reweighed sum, not of each
    member, and no gradient goes through weights and margins.
    """
    leave, reach = goal.overtaken(scores_NK), goal.reach
    tau = PUBLISHED_TAU[vote.name] if tau is None else tau
    s_MNK = (logits_MNK / tau).softmax(-1)
    ensemble_NK = mean_logits(logits_MNK) if vote.linear else s_MNK.mean(0)
    others = best_other(ensemble_NK.detach(), leave) if reach is None else reach
    s_y, s_other = gather(s_MNK.detach(), leave), gather(s_MNK.detach(), others)
    weights_MN = s_y * (1 + s_y - s_other) / (tau * len(s_MNK))  # eq. 10, as printed
    if vote.linear:  # the mean's derivative by each member
        weights_MN = torch.full_like(s_y, 1 / len(s_MNK))
    lead_MN = _lead(logits_MNK.detach(), leave, reach)  # k^m of eq. 9, over the member's own runner-up
    weights_MN = weights_MN * (lead_MN > 0)
    members_NK = torch.einsum("mn,mnk->nk", weights_MN, logits_MNK)  # eq. 11
    mixture_NK = (1 - beta) * _norm(ensemble_NK, leave, reach) + beta * _norm(members_NK, leave, reach)
    return cross_entropy(mixture_NK, Goal(leave, reach))


def _lead(scores: Tensor, leave: Tensor, reach: Tensor | None) -> Tensor:
    return margin(scores, leave) if reach is None else gather(scores, leave) - gather(scores, reach)


def _norm(scores_NK: Tensor, leave: Tensor, reach: Tensor | None) -> Tensor:
    """Return scores divided by y's detached lead, and 0 where y does not lead (eq. 12)."""
    lead_N = _lead(scores_NK.detach(), leave, reach)
    leads_N = lead_N > 0
    scaled_NK = scores_NK / torch.where(leads_N, lead_N, 1).unsqueeze(-1)
    return torch.where(leads_N.unsqueeze(-1), scaled_NK, 0)


def released(
    logits_MNK: Tensor,
    scores_NK: Tensor,
    goal: Goal,
    *,
    beta: float,
    vote: Vote,
    tau: float | None = None,
) -> Tensor:
    """Return the loss that the released code maximises, (N,); towards a class, its plain cross-entropy on what is predicted.

    The arguments are those of `mora`. The ensemble's soft output counts as one more member; the weights, at a temperature of
    5, or 1.25 under hard votes, mix the derivatives of eq. 10 by two coordinates; with mean logits all are the same.
    """
    soft_NK = _soft(logits_MNK, vote)
    if goal.reach is not None:  # MORA's mixture is computed there, too, and then overwritten
        return -ce(_sharp(logits_MNK, vote), goal.reach)
    leave = goal.overtaken(scores_NK)
    sharpness = RELEASED_SHARPNESS[vote.name] if tau is None else 1 / tau
    outputs_JNK = torch.cat([logits_MNK, soft_NK.unsqueeze(0)])
    detached_JNK = outputs_JNK.detach()
    scale_N1 = (_gap(outputs_JNK).amax(0) / 10).clamp_min(1)  # one for all of a sample's outputs
    q_NK = (detached_JNK[:-1] / scale_N1).softmax(-1).sum(0) / len(outputs_JNK)
    weights_JN = _released_weights((sharpness * detached_JNK).softmax(-1), q_NK, leave)
    if not vote.linear:
        weights_JN = weights_JN * (detached_JNK.argmax(-1) == leave)
    members_NK = torch.einsum("jn,jnk->nk", weights_JN, outputs_JNK / scale_N1) / (ADDED + weights_JN.sum(0)).unsqueeze(-1)
    return ce((1 - beta) * soft_NK / _gap(soft_NK) + beta * members_NK, leave)


def _soft(logits_MNK: Tensor, vote: Vote) -> Tensor:
    """Return the scores that the released code differentiates."""
    if vote.linear:
        return mean_logits(logits_MNK)
    return log_mean_softmax(logits_MNK / _gap(logits_MNK) if vote.counted else logits_MNK)


def _sharp(logits_MNK: Tensor, vote: Vote) -> Tensor:
    """Return the scores that the released code predicts by: hard votes are soft ones, ten times as sharp."""
    if vote.counted:
        return log_mean_softmax(RELEASED_SHARPENED * logits_MNK / _gap(logits_MNK))
    return _soft(logits_MNK, vote)


def _gap(scores: Tensor) -> Tensor:
    """Return by how much the best score leads the second, (..., N, 1), with no gradient."""
    top = scores.detach().topk(2, -1).values
    return (top[..., :1] - top[..., 1:]).clamp_min(LEAST)


def _released_weights(s_JNK: Tensor, q_NK: Tensor, leave: Tensor) -> Tensor:
    """Return the weights (J, N) of the released code, whose sign slips where the label leads the mean ``q_NK``."""
    others = best_other(q_NK, leave)
    s_y, s_other, q_y, q_other = gather(s_JNK, leave), gather(s_JNK, others), gather(q_NK, leave), gather(q_NK, others)
    slipped = s_other * ((1 + s_other) / q_other - s_y / q_y)
    derivative = s_other * ((1 - s_other) / q_other + s_y / q_y)
    return torch.where(q_y > q_other, slipped, derivative)


class ReleasedTargetedSteps(CosineSteps):
    """A rule with MORA's schedule whose first step has momentum, too, as in the released code's descents at targets."""

    first = CosineSteps.momentum
