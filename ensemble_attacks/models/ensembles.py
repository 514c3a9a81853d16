"""Define ensembles of classifiers and the protocol by which attacks look inside them.

An ensemble is any ``nn.Module`` with ``member_logits(x) -> (M, N, K)`` and ``aggregate(member_logits) -> (N, K)``, whose
``forward(x)`` is ``aggregate(member_logits(x))``. Scores are logits: a vote that averages probabilities returns the
logarithm of the average, so that cross-entropy on it is the ensemble's own.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import NotAnEnsembleError
from ensemble_attacks.models import pooled, routed  # noqa: F401 (they name further votes)
from ensemble_attacks.models.ask import ask, beside
from ensemble_attacks.models.softening import scores_of
from ensemble_attacks.models.together import Together
from ensemble_attacks.models.votes import Vote, check_vote, vote_of, weighted
from ensemble_attacks.validation import check_same_classes


class Ensemble(nn.Module):
    """An ensemble of classifiers that decide together by a vote: images (N, C, H, W) -> scores (N, K).

    Args:
        members: modules (N, C, H, W) -> (N, K), of any architectures; each takes images in [0, 1]. `Together` stands for
            several that one network computes. They may lie on several devices; images and scores are where the first is.
        vote: ``"softmax"`` (log of the mean probability), ``"voting"`` (hard votes) or ``"logits"`` (mean logits); also
            ``"median"``, ``"max"``, ``"product"``, ``"borda"`` or ``"decided"`` (the member with the largest probability);
            or a `Vote`, of your own or of `ensemble_attacks.votes`.
        weights: a weight for each member in a named vote; ``None``: all the same.

    Raises:
        TypeError: Where a member is not an ``nn.Module``, or weights are given for a vote without a name.
        ValueError: Where there are no members, the vote is unknown, or there is not one weight for each member; on the first
            images, where members have different numbers of classes.

    >>> ensemble = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], vote="softmax")
    >>> x = torch.rand(5, 4)
    >>> ensemble.member_logits(x).shape, ensemble(x).shape
    (torch.Size([2, 5, 3]), torch.Size([5, 3]))
    """

    found = ""  # what `as_ensemble` recognised

    def __init__(
        self, members: Sequence[nn.Module], vote: str | Vote = "softmax", weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        members = list(members)
        if not members:
            raise ValueError("members is empty: an ensemble needs at least one classifier")
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"members[{index}] is a {type(member).__name__}: every member must be a torch.nn.Module")
        self.members = nn.ModuleList(members)
        self.vote: str | Vote | None = vote if weights is None else weighted(vote, weights)  # type: ignore[arg-type]
        known = check_vote(self.vote)
        if not any(isinstance(member, Together) for member in members):
            _check_number(known, len(members))
        if known.modules:
            self.of_vote = nn.ModuleList(known.modules)

    def member_logits(self, x: Tensor) -> Tensor:
        """Return the logits of every member, (M, N, K)."""
        answers: list[Tensor] = []
        for index, member in enumerate(self.members):
            own = beside(member, x)
            answers += member(own) if isinstance(member, Together) else [ask(member, own, f"members[{index}]")]
        answers = [scores_NK.to(x.device) for scores_NK in answers]  # once all devices have been told what to compute
        check_same_classes(answers)
        vote = vote_of(self)
        _check_number(vote, len(answers))
        logits_MNK = torch.stack(answers)
        return logits_MNK if vote.joined is None else vote.joined(x, logits_MNK)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        """Return the ensemble's scores, (N, K), from its members' logits, (M, N, K)."""
        assert self.vote is not None
        return scores_of(check_vote(self.vote), logits_MNK)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.member_logits(x))

    def extra_repr(self) -> str:
        return f"vote={self.vote!r}" + (f", found={self.found!r}" if self.found else "")


def _check_number(vote: Vote, members: int) -> None:
    if vote.members not in (None, members):
        raise ValueError(f"the vote {vote.name!r} is made for {vote.members} members, there are {members}")


def asks_each(model: Any) -> bool:
    """Tell whether a model is an `Ensemble` each of whose members is one network, whose answer nothing is done to."""
    own = isinstance(model, Ensemble) and type(model).member_logits is Ensemble.member_logits
    return own and not any(isinstance(part, Together) for part in model.members) and vote_of(model).joined is None


def shows_members(model: object) -> bool:
    """Tell whether a model has the protocol's two functions."""
    return all(callable(getattr(model, name, None)) for name in ("member_logits", "aggregate"))


def check_members(model: nn.Module, who: str) -> None:
    """Raise `NotAnEnsembleError` unless ``model`` shows its members; the message says that ``who`` needs them."""
    missing = [name for name in ("member_logits", "aggregate") if not callable(getattr(model, name, None))]
    if missing and hasattr(getattr(model, "module", None), "member_logits"):
        raise NotAnEnsembleError(f"{who} looks inside an ensemble, which {type(model).__name__} hides: pass its .module")
    if missing:
        raise NotAnEnsembleError(
            f"{who} looks inside an ensemble, but {type(model).__name__} has no {' and no '.join(missing)}: "
            "pass ensemble_attacks.Ensemble([...], vote=...), or as_ensemble(model, members=[...], vote=...); some "
            "structures as_ensemble(model) recognises"
        )
