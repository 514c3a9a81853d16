"""Put together members that answer about other classes than the ensemble's: subclasses, subsets, bits of a code.

Shape suffixes: M members, N samples, J classes of the members, K of the ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_attacks.models.ask import ask
from ensemble_attacks.models.votes import LOGITS, Vote, check_vote

ABSENT = -30.0  # logarithm of the probability of a class that a member does not know


def to_classes(logits: Tensor, classes: Sequence[int], count: int) -> Tensor:
    """Return the log-probabilities (..., K) of the classes that the members' classes belong to, from logits (..., J).

    Args:
        logits: (..., J).
        classes: for each of the J classes, the one of the K to which it belongs.
        count: K.
    """
    if logits.shape[-1] != len(classes):
        raise ValueError(f"classes names {len(classes)} classes, the members score {logits.shape[-1]}: name one for each")
    log_p = logits.log_softmax(-1)
    owned = [[j for j, k in enumerate(classes) if k == own] for own in range(count)]
    absent = torch.full_like(log_p[..., 0], ABSENT)
    return torch.stack([log_p[..., own].logsumexp(-1) if own else absent for own in owned], -1)


def _check_classes(classes: Sequence[int], count: int | None) -> tuple[list[int], int]:
    listed = [int(k) for k in classes]
    count = max(listed, default=-1) + 1 if count is None else count
    if count < 2 or min(listed, default=0) < 0 or max(listed) >= count:
        raise ValueError(f"classes {listed} must name, for each class of the members, one of {count} classes from 0 on")
    return listed, count


class Mapped(nn.Module):
    """A member over classes of its own, as one over the ensemble's: images (N, ...) -> log-probabilities (N, K).

    Args:
        net: images (N, ...) -> logits (N, J).
        classes: for each of the J classes, the one of the ensemble's K to which it belongs; several may belong to one. The
            probability of a class to which none belongs is practically 0.
        count: K.

    Raises:
        ValueError: Where a class is out of range; at the first images, where there are not J.
    """

    def __init__(self, net: nn.Module, classes: Sequence[int], count: int) -> None:
        super().__init__()
        self.net = net
        self.classes, self.count = _check_classes(classes, count)

    def forward(self, x: Tensor) -> Tensor:
        return to_classes(ask(self.net, x), self.classes, self.count)


def over(classes: Sequence[int], vote: str | Vote = "softmax", count: int | None = None) -> Vote:
    """Return a vote over the classes to which the members' classes belong, as `Mapped` has them, the same for all members.

    Args:
        classes: for each of the members' J classes, the one of the ensemble's K to which it belongs.
        vote: by its name, or a `Vote` over the K classes.
        count: K; ``None``: the largest of ``classes``, and one more.

    Raises:
        ValueError: Where a class is out of range, or the vote is unknown.
    """
    listed, count = _check_classes(classes, count)
    named = check_vote(vote)

    def seen(logits_MNJ: Tensor) -> Tensor:
        mapped_MNK = to_classes(logits_MNJ, listed, count)
        return mapped_MNK if named.seen is None else named.seen(mapped_MNK)

    def aggregate(logits_MNJ: Tensor) -> Tensor:
        return named.aggregate(to_classes(logits_MNJ, listed, count))

    return replace(named, aggregate=aggregate, seen=seen)


def _bits(logits_MN2: Tensor) -> Tensor:
    """Return how far each member's second class leads its first, (M, N)."""
    if logits_MN2.shape[-1] != 2:
        raise ValueError(f"members of a code have two classes, no and yes, got {logits_MN2.shape[-1]}")
    return logits_MN2[..., 1] - logits_MN2[..., 0]


def ecoc(code: Sequence[Sequence[int]], *, hard: bool = False) -> Vote:
    """Return the vote of an error-correcting output code (Dietterich & Bakiri 1995), of members that answer no or yes.

    The scores are ``sum_m log sigmoid(c_km b_m)`` with b_m the member's logit for yes less that for no (loss-based
    decoding; Allwein, Schapire & Singer 2000), or with ``hard``, the share of members that answer as the class's code word
    does.

    Args:
        code: the code words, (K, M), of 1 and -1 (or 0).
        hard: whether answers are compared, rather than how sure they are.

    Raises:
        ValueError: Where the code is no matrix, or holds other numbers; at the first vote, where members have other classes.
    """
    code_KM = torch.as_tensor(code).double()
    if code_KM.dim() != 2 or not ((code_KM == 1) | (code_KM == -1) | (code_KM == 0)).all():
        raise ValueError(f"code must be a matrix (K, M) of 1 and -1 (or 0), got shape {tuple(code_KM.shape)}")
    signs_M1K = torch.where(code_KM == 0, -1.0, code_KM).T.unsqueeze(1)

    def says(bits_MN: Tensor) -> Tensor:
        return signs_M1K.to(bits_MN) * bits_MN.unsqueeze(-1)

    def likelihood(logits_MN2: Tensor) -> Tensor:
        return F.logsigmoid(says(_bits(logits_MN2)))

    def agreeing(logits_MN2: Tensor) -> Tensor:
        return (says(_bits(logits_MN2)) > 0).to(logits_MN2.dtype).mean(0)

    def evened(logits_MN2: Tensor) -> Tensor:
        """Return what each member says of each class, with all members equally sure: those that a step can turn count."""
        bits_MN = _bits(logits_MN2)
        return says(bits_MN / bits_MN.detach().abs().clamp_min(torch.finfo(bits_MN.dtype).eps))

    def agreement(seen_MNK: Tensor, temperature: float | Tensor) -> Tensor:
        return seen_MNK.sigmoid().mean(0)  # all are equally sure already

    members = code_KM.shape[1]
    if hard:
        soft = Vote("ecoc", agreeing, soft=agreement, seen=evened, hard=True)
        return replace(soft, members=members)
    own = replace(LOGITS, name="ecoc", aggregate=lambda logits_MN2: likelihood(logits_MN2).sum(0))
    return replace(own, seen=likelihood, members=members)


def one_vs_rest() -> Vote:
    """Return the vote of members that tell one class each from the rest: member k's logit for yes less that for no.

    Member k has two classes, no and yes; there are as many classes as members.
    """

    def seen(logits_MN2: Tensor) -> Tensor:
        return torch.diag_embed(_bits(logits_MN2).T).transpose(0, 1)

    return replace(LOGITS, name="one-vs-rest", aggregate=lambda logits_MN2: _bits(logits_MN2).T, seen=seen)
