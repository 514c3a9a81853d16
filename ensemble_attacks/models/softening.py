"""Find what stands in for a vote whose scores have no gradient, such as one that counts votes.

Shape suffixes: M members, N samples, K classes, P probes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.models.aggregations import (
    VOTING_TEMPERATURE,
    log_expected_softmax,
    log_mean_softmax,
    straight_through,
    wants_gradient,
)
from ensemble_attacks.models.votes import Aggregate, Vote, at_temperature, log_weights_of

PROBES = 256  # members' answers on which a vote without gradient is tried
RIVALS = 3  # classes among which a probe's members choose, so that they agree often enough to outvote one another
AGREEMENT = 0.9  # share of probes that weighted votes have to decide as the vote does
EVENED = 0.0, 0.5, 1.0  # how far weights are tried nearer to equal ones: a vote that shows its winner alone exaggerates them
SURER, MOVED = 3.0, 0.01  # a factor on all logits that leaves the answers as they are, and the least that it has to move
LARGEST = 4096  # classes of all members together for which matrices are looked for
SURE = 1e-6  # by which a probe's best class must lead, to be compared


def softened(vote: Vote, logits_MNK: Tensor) -> Vote:
    """Return the vote, with a soft form to differentiate where one is found; its values stay as they are.

    A vote with a gradient that mostly decides alike where all members are less sure is its own soft form, at their mean
    temperature; others with a gradient have none. Where its scores have no gradient, the soft form is
    ``log sum_m w_m softmax(z^m / tau)`` with the temperature of hard votes. The weights are those with which weighted votes
    are nearest to what the vote makes of some hundred sets of members' answers (least squares), or all the same where no
    weights decide as it does (thresholds, ranks). Where such a vote is over other classes than its members', the soft form
    is ``sum_m softmax(z^m / tau) A_m`` with matrices found likewise. A vote whose scores hardly change with how sure its
    members are has no gradient worth following, either.

    Args:
        vote: any vote.
        logits_MNK: members' logits, which say how many there are, of how many classes, and their type; the result depends on
            nothing else.
    """
    if vote.soft is not None or vote.linear:
        return vote
    members, _, classes = logits_MNK.shape
    key = members, classes, logits_MNK.dtype, logits_MNK.device
    if key not in vote.known:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
            vote.known[key] = _softened(vote, members, logits_MNK.detach()[:, :0])
    return vote.known[key]


def scores_of(vote: Vote, logits_MNK: Tensor) -> Tensor:
    """Return the vote's scores (N, K), which have a gradient wherever one can be found (`softened`)."""
    if not wants_gradient(logits_MNK):
        return vote.aggregate(logits_MNK)
    vote = softened(vote, logits_MNK)
    if vote.hard:
        assert vote.soft is not None
        with torch.no_grad():
            values_NK = vote.aggregate(logits_MNK.detach())
        return straight_through(values_NK, vote.soft(vote.over_classes(logits_MNK), VOTING_TEMPERATURE))
    return vote.aggregate(logits_MNK)


def _softened(vote: Vote, members: int, like_MNK: Tensor) -> Vote:
    logits_MPK = _probes(members, like_MNK, PROBES)
    if _has_gradient(vote.aggregate, logits_MPK):
        return replace(vote, soft=partial(_less_sure, vote.aggregate)) if _scales(vote.aggregate, logits_MPK) else vote
    with torch.no_grad():
        scores_PK = vote.aggregate(logits_MPK)
        if scores_PK.shape[1] != logits_MPK.shape[2]:
            return _of_other_classes(vote, members, like_MNK)
    weights_M = _weights(logits_MPK, scores_PK)
    soft: Aggregate = log_mean_softmax if weights_M is None else partial(log_expected_softmax, probabilities_M=weights_M)
    return replace(vote, soft=at_temperature(soft), least=0.0, hard=True, log_weights=log_weights_of(weights_M))


def _less_sure(aggregate: Aggregate, logits_MNK: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the scores of members that are less sure, all alike, so that which of them decides stays as it is."""
    return aggregate(logits_MNK / (temperature.mean(0) if isinstance(temperature, Tensor) else temperature))


def _scales(aggregate: Aggregate, logits_MPK: Tensor) -> bool:
    """Tell whether the vote mostly decides alike where all members are less sure than the surest probes."""
    with torch.no_grad():
        sure_PK, less_PK = aggregate(logits_MPK), aggregate(logits_MPK / SURER)
    return (sure_PK.argmax(-1) == less_PK.argmax(-1)).double().mean().item() >= AGREEMENT


def _of_other_classes(vote: Vote, members: int, like_MNJ: Tensor) -> Vote:
    """Return the vote with a soft form that is linear in the members' probabilities, as near to it as there is one."""
    answers = members * like_MNJ.shape[-1]
    if answers > LARGEST:
        return vote
    logits_MPJ = _probes(members, like_MNJ, max(PROBES, 4 * answers))
    votes_PA = F.one_hot(logits_MPJ.argmax(-1), logits_MPJ.shape[-1]).double().transpose(0, 1).flatten(1)
    scores_PK = _finite(vote.aggregate(logits_MPJ).double())
    matrix_AK = torch.linalg.pinv(votes_PA.T @ votes_PA, hermitian=True) @ (votes_PA.T @ scores_PK)
    return replace(vote, soft=at_temperature(partial(_linear, matrix_AK)), least=0.0, hard=True)


def _linear(matrix_AK: Tensor, logits_MNJ: Tensor) -> Tensor:
    return logits_MNJ.softmax(-1).transpose(0, 1).flatten(1) @ matrix_AK.to(logits_MNJ)


def _finite(scores_PK: Tensor) -> Tensor:
    """Return the scores with the lowest finite one in place of -inf, the logarithm of no vote."""
    finite = scores_PK[scores_PK.isfinite()]
    return scores_PK.nan_to_num(neginf=finite.amin().item() if len(finite) else 0.0)


def _probes(members: int, like_MNK: Tensor, count: int) -> Tensor:
    """Return members' logits (M, P, K), each with one class ahead by some gap."""
    classes = like_MNK.shape[-1]
    generator, device = torch.Generator().manual_seed(0), torch.device("cpu")
    rivals_PR = torch.stack([torch.randperm(classes, generator=generator, device=device)[:RIVALS] for _ in range(count)])
    chosen_MP = torch.randint(rivals_PR.shape[1], (members, count), generator=generator, device=device)
    ahead_MP = torch.gather(rivals_PR.expand(members, -1, -1), 2, chosen_MP.unsqueeze(-1)).squeeze(-1)
    noise_MPK = torch.rand((members, count, classes), generator=generator, device=device)
    gaps_MP1 = 1 + 5 * torch.rand((members, count, 1), generator=generator, device=device)
    return (noise_MPK + gaps_MP1 * F.one_hot(ahead_MP, classes)).to(like_MNK)


def _has_gradient(aggregate: Aggregate, logits_MNK: Tensor) -> bool:
    """Tell whether the scores change with the logits, by autograd, and by more than what breaks ties."""
    with torch.no_grad():
        scores, surer = aggregate(logits_MNK), aggregate(SURER * logits_MNK)
        if (_finite(surer) - _finite(scores)).abs().amax() <= MOVED * _finite(scores).std():
            return False
    logits_MNK = logits_MNK.detach().clone().requires_grad_()
    with torch.enable_grad():
        try:
            scores_NK = aggregate(logits_MNK)
        except RuntimeError:  # of an operation that has no gradient, such as numpy's
            return False
        if not scores_NK.requires_grad:
            return False
        uneven_NK = torch.arange(1.0, 1 + scores_NK.numel()).view_as(scores_NK).sin().to(scores_NK)
        (gradient,) = torch.autograd.grad((scores_NK * uneven_NK).sum(), logits_MNK, allow_unused=True)
    return gradient is not None and bool((gradient != 0).any())


def _weights(logits_MPK: Tensor, scores_PK: Tensor) -> Tensor | None:
    """Return the weights (M,) of the votes that decide as the scores do, which sum to 1; ``None`` where there are none."""
    votes_MPK = F.one_hot(logits_MPK.argmax(-1), logits_MPK.shape[-1]).double()
    scores_PK = _finite(scores_PK.double())
    unknown = torch.cat([votes_MPK.flatten(1), torch.ones_like(votes_MPK[:1]).flatten(1)]).T  # votes of each member, and 1
    solution = torch.linalg.pinv(unknown.T @ unknown) @ (unknown.T @ scores_PK.flatten())
    weights_M = solution[:-1].clamp_min(0)
    if not weights_M.isfinite().all() or weights_M.sum() <= 0:
        return None
    weights_M = weights_M / weights_M.sum()
    sure_P = _leads(scores_PK) > SURE
    evened = [(1 - share) * weights_M + share / len(weights_M) for share in EVENED]
    agreements = [_agreement(weights, votes_MPK[:, sure_P], scores_PK[sure_P]) for weights in evened]
    return evened[agreements.index(max(agreements))] if max(agreements) >= AGREEMENT else None


def _agreement(weights_M: Tensor, votes_MPK: Tensor, scores_PK: Tensor) -> float:
    """Return the share of probes on which weighted votes decide as the scores do."""
    if not len(scores_PK):
        return 0.0
    decided_PK = torch.einsum("m,mpk->pk", weights_M, votes_MPK)
    agree_P = (decided_PK.argmax(-1) == scores_PK.argmax(-1)) & (_leads(decided_PK) > SURE)
    return agree_P.double().mean().item()


def _leads(scores_PK: Tensor) -> Tensor:
    top_P2 = scores_PK.topk(2, -1).values
    return top_P2[:, 0] - top_P2[:, 1]
