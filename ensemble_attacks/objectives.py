"""What attacks maximise: pure functions of logits, one value per sample.

Shape suffixes: M members, N samples, K classes. ``scores_NK`` are a model's outputs, ``logits_MNK`` its members'.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.ensembles import log_mean_softmax, mean_logits

WEIGHT_RULES = ("derivative", "published", "runner-up", "code")
SMALLEST_MARGIN = 1e-3  # of the scores' spread, or of 1: no score is divided by less, as at the boundary by 0


def gather(scores: Tensor, classes_N: Tensor) -> Tensor:
    """The score of one class per sample: (..., N, K), (N,) -> (..., N)."""
    return scores.gather(-1, classes_N.expand(scores.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def mask_class(scores: Tensor, classes_N: Tensor) -> Tensor:
    """``scores`` (..., N, K) with -inf at one class per sample."""
    at_class = F.one_hot(classes_N, scores.shape[-1]).bool()
    return scores.masked_fill(at_class, -torch.inf)


def best_other(scores: Tensor, classes_N: Tensor) -> Tensor:
    """The best-scored class that is not the given one: (..., N, K) -> (..., N), int64."""
    return mask_class(scores, classes_N).argmax(-1)


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """``z_y - max_{j != y} z_j``: negative exactly where the prediction is wrong beyond a tie. (..., N, K) -> (..., N)."""
    return gather(scores, labels) - mask_class(scores, labels).amax(-1)


def targeted_margin(scores: Tensor, targets: Tensor) -> Tensor:
    """``max_{j != t} z_j - z_t``: negative exactly where the prediction is the target, beyond a tie."""
    return -margin(scores, targets)


def ce(scores_NK: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, (N,), in nats."""
    return F.cross_entropy(scores_NK, labels, reduction="none")


def dlr(scores_NK: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (N,) (Croce & Hein 2020, "Reliable evaluation ...", eq. 6). Needs K >= 3."""
    ranked_NK = scores_NK.sort(-1, descending=True).values
    return -margin(scores_NK, labels) / (ranked_NK[:, 0] - ranked_NK[:, 2] + 1e-12)


def dlr_targeted(scores_NK: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR, (N,) (Croce & Hein 2020, eq. 7). Needs K >= 4."""
    ranked_NK = scores_NK.sort(-1, descending=True).values
    spread_N = ranked_NK[:, 0] - (ranked_NK[:, 2] + ranked_NK[:, 3]) / 2 + 1e-12
    return -(gather(scores_NK, labels) - gather(scores_NK, targets)) / spread_N


def log_reweighing(logits_MNK: Tensor, labels: Tensor, others: Tensor, rule: str = "derivative") -> Tensor:
    """Logarithm of MORA's member weights without their constant 1 / (tau M), (M, N).

    ``logits_MNK`` are already divided by the temperature; ``others`` is the class to overtake y, (N,).

    With E = mean_m softmax(z^m / tau), k^m = z_y - z_other moved through z_y, the weight is the derivative of E_y - E_other
    (MORA, eq. 10). ``rule`` chooses the reading of that equation:

    - ``"derivative"``: s_y (1 - s_y + s_other), the true derivative;
    - ``"published"``: s_y (1 + s_y - s_other), as printed;
    - ``"runner-up"``: s_other (1 + s_y - s_other), the derivative with k^m moved through z_other;
    - ``"code"``: s_other ((1 + s_other) / E_other - s_y / E_y), as the released code computes it.

    In log-space; for the default rule 1 - s_y is the sum of the other probabilities, never a difference, so that a confident
    member (s_y = 1 in floating point) keeps its true, tiny weight.
    """
    log_s_MNK = logits_MNK.log_softmax(-1)
    log_s_y, log_s_other = gather(log_s_MNK, labels), gather(log_s_MNK, others)
    if rule == "derivative":
        log_rest = mask_class(log_s_MNK, labels).logsumexp(-1)  # log(1 - s_y)
        return log_s_y + torch.logaddexp(log_rest, log_s_other)
    if rule == "published":
        return log_s_y + torch.log1p(log_s_y.exp() - log_s_other.exp())
    if rule == "runner-up":
        return log_s_other + torch.log1p(log_s_y.exp() - log_s_other.exp())
    log_e_NK = log_mean_softmax(logits_MNK)
    log_e_y, log_e_other = gather(log_e_NK, labels), gather(log_e_NK, others)
    first = torch.log1p(log_s_other.exp()) - log_e_other
    second = log_s_y - log_e_y
    return log_s_other + first + torch.log(-torch.expm1((second - first).clamp_max(0)))


def reweigh(
    logits_MNK: Tensor,
    labels: Tensor,
    others: Tensor,
    *,
    masked: bool,
    rule: str,
    probabilities: Tensor | None = None,
) -> Tensor:
    """MORA's member weights (M, N), summing to 1 over the members (MORA, eq. 10 and the indicator of eq. 11).

    With ``masked``, members that already prefer ``others`` to y weigh nothing; where that, or the rule, leaves no member,
    all weigh the same. Of a model that draws members with ``probabilities`` (M,), the weights are those of the expected
    vote, and the members that weigh nothing those that are wrong already, whichever class they prefer.
    """
    log_weights_MN = log_reweighing(logits_MNK, labels, others, rule)
    if probabilities is not None:
        log_weights_MN = log_weights_MN + probabilities.to(log_weights_MN).log().unsqueeze(-1)
    if masked:
        lead_MN = gather(logits_MNK, labels) - gather(logits_MNK, others)
        if probabilities is not None:
            lead_MN = margin(logits_MNK, labels)
        log_weights_MN = log_weights_MN.masked_fill(lead_MN <= 0, -torch.inf)
    nobody_N = log_weights_MN.amax(0) == -torch.inf
    return log_weights_MN.masked_fill(nobody_N, 0.0).softmax(0)


def at_least(gaps: Tensor, scores: Tensor) -> Tensor:
    """Gaps (...) between some of the ``scores`` (..., K), but none so small that dividing by it would end in infinity."""
    spread = scores.amax(-1) - scores.amin(-1)
    spread = torch.where(spread > 0, spread.clamp(torch.finfo(scores.dtype).tiny ** 0.5, 1), 1)
    return gaps.maximum(SMALLEST_MARGIN * spread)


def normalize_margin(scores_NK: Tensor, labels: Tensor, others: Tensor | None = None) -> Tensor:
    """Scores divided by their own, detached, margin (MORA, eq. 12), so that softmax of them neither saturates nor vanishes.

    The margin is of y over the best other class, or over ``others``.
    """
    detached = scores_NK.detach()
    lead_N = margin(detached, labels) if others is None else gather(detached, labels) - gather(detached, others)
    return scores_NK / at_least(lead_N.abs(), detached).unsqueeze(-1)


def mora(
    logits_MNK: Tensor,
    scores_NK: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
    *,
    beta: float,
    vote: str | None,
    tau: float | None = None,
    rule: str = "derivative",
    probabilities: Tensor | None = None,
) -> Tensor:
    """MORA's loss, (N,) (Yu et al., NeurIPS 2022, eq. 7-12): cross-entropy of a mixture of the ensemble's own scores and
    its members' logits, reweighed towards the members whose change moves the vote most.

    Args:
        logits_MNK: the members' logits.
        scores_NK: the ensemble's scores; used for an aggregation that is none of the three votes (``vote=None``).
        labels: the classes to leave, (N,).
        targets: the classes to reach instead, (N,); ``None`` is the ensemble's best other class, at every step anew.
        beta: share of the reweighed members, in [0, 1]; the rest is the ensemble's. With ``vote="logits"`` and the true
            derivative it makes no difference: every member moves the mean by 1 / M.
        vote: the ensemble's vote, which decides temperature, indicator and ensemble term.
        tau: temperature of the members' softmax. ``None``: 1, but for ``"voting"`` each member's own top-1 minus top-2
            gap, per sample, which follows the hard vote more closely than any fixed temperature.
        probabilities: with which the model draws each member, (M,), if it is a random one.
    """
    detached_MNK = logits_MNK.detach()
    temperature: float | Tensor
    if tau is not None:
        temperature = tau
    elif vote == "voting":
        top_MN2 = detached_MNK.topk(2, -1).values
        temperature = at_least(top_MN2[..., 0] - top_MN2[..., 1], detached_MNK).unsqueeze(-1)
    else:
        temperature = 1.0

    if vote == "logits":
        ensemble_NK = mean_logits(logits_MNK)
    elif vote in ("softmax", "voting") and probabilities is None:
        ensemble_NK = log_mean_softmax(logits_MNK / temperature)
    else:
        ensemble_NK = scores_NK
    others = best_other(ensemble_NK.detach(), labels) if targets is None else targets
    if vote == "logits" and rule == "derivative":
        members_NK = ensemble_NK  # E is the mean of the logits: its derivative by k^m is 1 / M for every member
    else:
        weights_MN = reweigh(
            detached_MNK / temperature, labels, others, masked=vote != "logits", rule=rule, probabilities=probabilities
        )
        members_NK = torch.einsum("mn,mnk->nk", weights_MN, logits_MNK)

    mixture_NK = (1 - beta) * normalize_margin(ensemble_NK, labels, targets)
    mixture_NK = mixture_NK + beta * normalize_margin(members_NK, labels, targets)
    return ce(mixture_NK, labels) if targets is None else -ce(mixture_NK, targets)
