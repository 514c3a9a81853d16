"""Ensembles of classifiers and the protocol by which attacks look inside them.

An ensemble is any ``nn.Module`` with ``member_logits(x) -> (M, N, K)`` and ``aggregate(member_logits) -> (N, K)``, whose
``forward(x)`` is ``aggregate(member_logits(x))``. Scores are logits: a vote that averages probabilities returns the
logarithm of the average, so that cross-entropy on it is the ensemble's own.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import AggregateMismatchError, NotAnEnsembleError, unknown_name
from ensemble_attacks.models.preserve import preserved
from ensemble_attacks.models.votes import VOTES, _tied, check_vote
from ensemble_attacks.validation import check_member_logits, check_module, check_scores


class Ensemble(nn.Module):
    """Classifiers that decide together.

    Args:
        members: modules (N, C, H, W) -> (N, K), of any architectures; each takes images in [0, 1].
        vote: ``"softmax"`` (log of the mean probability), ``"voting"`` (hard votes) or ``"logits"`` (mean logits).

    Raises:
        TypeError: a member that is not an ``nn.Module``.
        ValueError: no members, or an unknown vote.

    >>> ensemble = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], vote="softmax")
    >>> x = torch.rand(5, 4)
    >>> ensemble.member_logits(x).shape, ensemble(x).shape
    (torch.Size([2, 5, 3]), torch.Size([5, 3]))
    """

    def __init__(self, members: Sequence[nn.Module], vote: str = "softmax") -> None:
        super().__init__()
        members = list(members)
        if not members:
            raise ValueError("members is empty: an ensemble needs at least one classifier")
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"members[{index}] is a {type(member).__name__}: every member must be a torch.nn.Module")
        self.members = nn.ModuleList(members)
        self.vote: str | None = check_vote(vote)

    def member_logits(self, x: Tensor) -> Tensor:
        """Logits of every member, (M, N, K)."""
        logits = [member(x) for member in self.members]
        for index, logits_NK in enumerate(logits):
            check_scores(logits_NK, len(x), f"members[{index}]")
        return torch.stack(logits)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        """The ensemble's scores, (N, K), from its members' logits."""
        return VOTES[str(self.vote)](logits_MNK)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.member_logits(x))

    def extra_repr(self) -> str:
        return f"vote={self.vote!r}"


class AdoptedEnsemble(Ensemble):
    """Somebody else's ensemble, seen through the protocol: its own forward, with the members and vote claimed for it.

    The first images that reach `member_logits` are also put through the model itself, as are mixtures of them, where members
    are less of one mind; where the claimed members and vote predict otherwise, `AggregateMismatchError` says how often.
    """

    def __init__(self, original: nn.Module, members: Sequence[nn.Module], vote: str | Callable[[Tensor], Tensor]) -> None:
        super().__init__(members, "softmax" if callable(vote) else vote)
        self.original = original
        self._aggregate = vote if callable(vote) else VOTES[vote]
        if callable(vote):
            self.vote = None
        self._verified = False
        self.own_ties = False  # hard votes that tie have been seen to be broken otherwise: then the model itself decides
        self.training = self.members.training = original.training

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x)

    def member_logits(self, x: Tensor) -> Tensor:
        if not self._verified:
            self.verify(x)
        return super().member_logits(x)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return self._aggregate(logits_MNK)

    @torch.no_grad()
    def _compare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where the claimed members and vote predict another class than the model itself, apart from votes that tie, and
        where they do as these tie; each (N,) bool.
        """
        logits_MNK = super().member_logits(x)
        differ = _predict_otherwise(self.original(x), self.aggregate(logits_MNK))
        tied = _tied(logits_MNK, self.vote)
        return differ & ~tied, differ & tied

    def verify(self, x: Tensor) -> None:
        """Raise `AggregateMismatchError` unless members and vote reproduce the model's own predictions on ``x`` (N, ...).

        How hard votes that tie are broken is the model's own affair, and not looked at.
        """
        mixtures = [x] + [share * x + (1 - share) * x.roll(1, 0) for share in (0.3, 0.5, 0.7)]
        differ, ties = (torch.cat(parts) for parts in zip(*map(self._compare, mixtures), strict=True))
        if differ.any():
            raise AggregateMismatchError(
                f"the claimed members and vote={self.vote or 'callable'!r} predict another class than the model itself on "
                f"{int(differ[: len(x)].sum())} of {len(x)} images and {int(differ[len(x) :].sum())} of "
                f"{len(differ) - len(x)} mixtures of them: name the right vote ({', '.join(VOTES)}, or a callable "
                "(M, N, K) -> (N, K)), and members that take the same input as the model (any preprocessing included). A "
                "random model differs from itself: freeze its draws"
            )
        self._verified, self.own_ties = True, bool(ties.any())

    def warn_of_mismatch(self, x_adv: Tensor) -> None:
        """Warn where the claim, true of the clean images, fails on adversarial ones."""
        apart, ties = self._compare(x_adv)
        differ = torch.nonzero(apart if self.own_ties else apart | ties).squeeze(-1).tolist()
        if differ:
            warnings.warn(
                f"on {len(differ)} of {len(x_adv)} adversarial images (the first: {differ[:5]}) the claimed members and "
                f"vote={self.vote or 'callable'!r} predict another class than the model itself: the vote claimed for it is "
                "not quite its own, and the attack was misled",
                stacklevel=2,
            )


@torch.no_grad()
def check_protocol(model: Any, x: Tensor) -> None:
    """Raise `AggregateMismatchError` where ``aggregate(member_logits(x))`` predicts otherwise than the model itself, votes
    that tie apart; not of an adopted ensemble, which looks itself, or of a random model, which differs from itself.
    """
    if isinstance(model, AdoptedEnsemble) or probabilities_of(model) is not None:
        return
    own_NK, logits_MNK = model(x), model.member_logits(x)
    check_member_logits(logits_MNK, len(x), type(model).__name__)
    differ = _predict_otherwise(own_NK, model.aggregate(logits_MNK))
    differ &= ~_tied(logits_MNK, getattr(model, "vote", None))
    if differ.any() and torch.equal(model(x), own_NK):
        raise AggregateMismatchError(
            f"aggregate(member_logits(x)) of {type(model).__name__} predicts another class than its forward on "
            f"{int(differ.sum())} of {len(x)} images: mend it (its members see no hook or preprocessing of the forward), "
            "or name members and vote: as_ensemble(model, members=[...], vote=...)"
        )


def _predict_otherwise(own_NK: Tensor, claimed_NK: Tensor) -> Tensor:
    """(N,) bool: where a model's own scores and those claimed for it predict different classes."""
    if own_NK.shape != claimed_NK.shape:
        raise AggregateMismatchError(
            f"the model's scores have shape {tuple(own_NK.shape)}, those of the claimed members {tuple(claimed_NK.shape)}"
        )
    return own_NK.argmax(1) != claimed_NK.argmax(1)


def as_ensemble(
    model: nn.Module,
    members: Sequence[nn.Module | str] | None = None,
    vote: str | Callable[[Tensor], Tensor] = "softmax",
    *,
    inputs: Tensor | None = None,
) -> nn.Module:
    """Adopt a third party's ensemble without rewriting it.

    Args:
        model: anything (N, C, H, W) -> (N, K). Without ``members`` it has to show ``member_logits`` and ``aggregate``
            itself, and is returned as it is.
        members: its classifiers, as modules or as names of submodules (``"net.0"``).
        vote: how it combines them: a name, or a function (M, N, K) -> (N, K).
        inputs: real images to check the claim on at once; otherwise it is checked on the first ones attacked.

    Raises:
        NotAnEnsembleError: no members named, and none shown by the model.
        AggregateMismatchError: the claimed members and vote do not reproduce the model's own predictions.
        ValueError: a name in ``members`` that is no submodule.

    >>> nets = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
    >>> class Theirs(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.nets = nets
    ...     def forward(self, x):
    ...         return sum(net(x) for net in self.nets)
    >>> as_ensemble(Theirs(), members=["nets.0", "nets.1"], vote="logits", inputs=torch.rand(8, 4)).vote
    'logits'
    """
    check_module(model)
    if members is None:
        check_members(model, "as_ensemble")
        if inputs is not None:
            with preserved(model):
                model.eval()
                check_protocol(model, inputs)
        return model
    known, members = dict(model.named_modules()), list(members)
    for member in members:
        if isinstance(member, str) and member not in known:
            raise unknown_name(f"submodule of {type(model).__name__}", member, [name for name in known if name])
    ensemble = AdoptedEnsemble(model, [known[m] if isinstance(m, str) else m for m in members], vote)
    if inputs is not None:
        with preserved(ensemble):
            ensemble.eval()
            ensemble.verify(inputs)
    return ensemble


def check_members(model: nn.Module, who: str) -> None:
    """Raise `NotAnEnsembleError` unless ``model`` shows its members."""
    missing = [name for name in ("member_logits", "aggregate") if not callable(getattr(model, name, None))]
    if missing and hasattr(getattr(model, "module", None), "member_logits"):
        raise NotAnEnsembleError(f"{who} looks inside an ensemble, which {type(model).__name__} hides: pass its .module")
    if missing:
        raise NotAnEnsembleError(
            f"{who} looks inside an ensemble, but {type(model).__name__} has no {' and no '.join(missing)}: "
            "pass ensemble_attacks.Ensemble([...], vote=...), or as_ensemble(model, members=[...], vote=...)"
        )


def probabilities_of(model: nn.Module) -> Tensor | None:
    """With which probability a model that draws a member for each answer draws each, (M,); ``None``: it does not say so.

    Such a model has ``member_logits(x) -> (M, N, K)`` and ``probabilities``, (M,), that sum to 1.
    """
    probabilities = getattr(model, "probabilities", None)
    return probabilities if isinstance(probabilities, Tensor) and hasattr(model, "member_logits") else None
