"""Define ensembles of classifiers and the protocol by which attacks look inside them.

An ensemble is any ``nn.Module`` with ``member_logits(x) -> (M, N, K)`` and ``aggregate(member_logits) -> (N, K)``, whose
``forward(x)`` is ``aggregate(member_logits(x))``. Scores are logits: a vote that averages probabilities returns the
logarithm of the average, so that cross-entropy on it is the ensemble's own.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import AggregateMismatchError, NotAnEnsembleError, unknown_name
from ensemble_attacks.models.ask import as_module, ask, ask_members
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.votes import OWN, VOTES, Aggregate, Vote, as_vote, check_vote, vote_of

FEW = 8  # images on which an ensemble is compared with what it shows


class Ensemble(nn.Module):
    """An ensemble of classifiers that decide together by a vote: images (N, C, H, W) -> scores (N, K).

    Args:
        members: modules (N, C, H, W) -> (N, K), of any architectures; each takes images in [0, 1].
        vote: ``"softmax"`` (log of the mean probability), ``"voting"`` (hard votes) or ``"logits"`` (mean logits), or a
            `Vote` of your own.

    Raises:
        TypeError: Where a member is not an ``nn.Module``.
        ValueError: Where there are no members, or the vote is unknown.

    >>> ensemble = Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)], vote="softmax")
    >>> x = torch.rand(5, 4)
    >>> ensemble.member_logits(x).shape, ensemble(x).shape
    (torch.Size([2, 5, 3]), torch.Size([5, 3]))
    """

    def __init__(self, members: Sequence[nn.Module], vote: str | Vote = "softmax") -> None:
        super().__init__()
        members = list(members)
        if not members:
            raise ValueError("members is empty: an ensemble needs at least one classifier")
        for index, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"members[{index}] is a {type(member).__name__}: every member must be a torch.nn.Module")
        self.members = nn.ModuleList(members)
        self.vote: str | Vote | None = vote
        check_vote(vote)

    def member_logits(self, x: Tensor) -> Tensor:
        """Return the logits of every member, (M, N, K)."""
        return torch.stack([ask(member, x, f"members[{index}]") for index, member in enumerate(self.members)])

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        """Return the ensemble's scores, (N, K), from its members' logits, (M, N, K)."""
        assert self.vote is not None
        return check_vote(self.vote).aggregate(logits_MNK)

    def forward(self, x: Tensor) -> Tensor:
        return self.aggregate(self.member_logits(x))

    def extra_repr(self) -> str:
        return f"vote={self.vote!r}"


class AdoptedEnsemble(Ensemble):
    """Somebody else's ensemble, which keeps its own forward pass and shows the members and vote that are claimed for it.

    The first images that reach `member_logits` are also put through the model itself, as are mixtures of them, on which the
    members agree less; where the claimed members and vote predict otherwise, `AggregateMismatchError` says how often.
    """

    def __init__(self, original: nn.Module, members: Sequence[nn.Module], vote: str | Vote | Aggregate) -> None:
        claimed = as_vote(vote)
        super().__init__(members, claimed)
        self.original = original
        self.vote = None if claimed.name == OWN else claimed.name if isinstance(vote, str) else claimed
        self.claimed = claimed
        self.verified = False
        self.own_ties = False  # hard votes that tie have been seen to be broken otherwise: then the model itself decides
        self.training = self.members.training = original.training

    @property
    def vote_said(self) -> str:
        """Return the name of the claimed vote, for messages."""
        return "callable" if self.claimed.name == OWN else self.claimed.name

    def forward(self, x: Tensor) -> Tensor:
        return self.original(x)

    def member_logits(self, x: Tensor) -> Tensor:
        if not self.verified:
            self.verify(x)
        return super().member_logits(x)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return self.claimed.aggregate(logits_MNK)

    @torch.no_grad()
    def _compare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the claimed members and vote predict another class than the model itself; two tensors (N,) bool.

        The first holds the samples whose votes do not tie, the second those whose votes do.
        """
        logits_MNK = super().member_logits(x)
        differ = _predict_otherwise(ask(self.original, x), self.aggregate(logits_MNK))
        tied = self.claimed.tied(logits_MNK)
        return differ & ~tied, differ & tied

    def verify(self, x: Tensor) -> None:
        """Raise `AggregateMismatchError` unless members and vote reproduce the model's own predictions on ``x`` (N, ...).

        The model may break ties of hard votes as it likes: samples whose votes tie are not compared.
        """
        mixtures = [x] + [share * x + (1 - share) * x.roll(1, 0) for share in (0.3, 0.5, 0.7)]
        differ, ties = (torch.cat(parts) for parts in zip(*map(self._compare, mixtures), strict=True))
        if differ.any():
            raise AggregateMismatchError(
                f"the claimed members and vote={self.vote_said!r} predict another class than the model itself on "
                f"{int(differ[: len(x)].sum())} of {len(x)} images and {int(differ[len(x) :].sum())} of "
                f"{len(differ) - len(x)} mixtures of them: name the right vote ({', '.join(VOTES)}, or a callable "
                "(M, N, K) -> (N, K)), and members that take the same input as the model (any preprocessing included). A "
                "random model differs from itself: freeze its draws"
            )
        self.verified, self.own_ties = True, bool(ties.any())

    def warn_of_mismatch(self, x_adv: Tensor) -> None:
        """Warn where the claim, true of the clean images, fails on adversarial ones."""
        apart, ties = self._compare(x_adv)
        differ = torch.nonzero(apart if self.own_ties else apart | ties).squeeze(-1).tolist()
        if differ:
            warnings.warn(
                f"on {len(differ)} of {len(x_adv)} adversarial images (the first: {differ[:5]}) the claimed members and "
                f"vote={self.vote_said!r} predict another class than the model itself: the vote claimed for it is "
                "not quite its own, and the attack was misled",
                stacklevel=2,
            )


@torch.no_grad()
def check_protocol(model: Any, x: Tensor) -> None:
    """Raise `AggregateMismatchError` where ``aggregate(member_logits(x))`` predicts otherwise than the model itself.

    Samples whose votes tie do not count, and a random model, which differs from itself, is not checked. An adopted ensemble
    is compared on all images, and only once; any other on the first few.
    """
    adopted = getattr(model, "counted", model)
    if isinstance(adopted, AdoptedEnsemble) and not adopted.verified:
        adopted.verify(x)
    if isinstance(adopted, AdoptedEnsemble) or member_probabilities(model) is not None:
        return
    x = x[:FEW]
    logits_MNK, own_NK = ask_members(model, x), ask(model, x)
    differ = _predict_otherwise(own_NK, model.aggregate(logits_MNK))
    differ &= ~vote_of(model).tied(logits_MNK)
    if differ.any() and torch.equal(ask(model, x), own_NK):
        raise AggregateMismatchError(
            f"aggregate(member_logits(x)) of {type(model).__name__} predicts another class than its forward on "
            f"{int(differ.sum())} of {len(x)} images: mend it (its members see no hook or preprocessing of the forward), "
            "or name members and vote: as_ensemble(model, members=[...], vote=...)"
        )


def _predict_otherwise(own_NK: Tensor, claimed_NK: Tensor) -> Tensor:
    """Return where a model's own scores and those claimed for it predict different classes, (N,) bool.

    Raises:
        AggregateMismatchError: Where the scores differ in shape.
    """
    if own_NK.shape != claimed_NK.shape:
        raise AggregateMismatchError(
            f"the model's scores have shape {tuple(own_NK.shape)}, those of the claimed members {tuple(claimed_NK.shape)}"
        )
    return own_NK.argmax(1) != claimed_NK.argmax(1)


def as_ensemble(
    model: nn.Module,
    members: Sequence[nn.Module | str] | None = None,
    vote: str | Vote | Aggregate = "softmax",
    *,
    inputs: Tensor | None = None,
) -> nn.Module:
    """Adopt a third party's ensemble without rewriting it.

    Args:
        model: anything (N, C, H, W) -> (N, K). Without ``members`` it has to show ``member_logits`` and ``aggregate``
            itself, and is returned as it is.
        members: its classifiers, as modules or as names of submodules (``"net.0"``).
        vote: how it combines them: a name, a `Vote`, or a function (M, N, K) -> (N, K).
        inputs: real images to check the claim on at once; otherwise it is checked on the first ones attacked.

    Returns:
        An ensemble whose forward pass is that of ``model``, or ``model`` itself.

    Raises:
        NotAnEnsembleError: Where no members are named, and the model shows none.
        AggregateMismatchError: Where the claimed members and vote do not reproduce the model's own predictions.
        ValueError: Where a name in ``members`` is no submodule, or the vote is unknown.

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
    model = as_module(model)
    if members is None:
        check_members(model, "as_ensemble")
        if inputs is not None:
            with guarded(model):
                check_protocol(model, inputs)
        return model
    known, members = dict(model.named_modules()), list(members)
    for member in members:
        if isinstance(member, str) and member not in known:
            raise unknown_name(f"submodule of {type(model).__name__}", member, [name for name in known if name])
    ensemble = AdoptedEnsemble(model, [known[m] if isinstance(m, str) else m for m in members], vote)
    if inputs is not None:
        with guarded(ensemble):
            ensemble.verify(inputs)
    return ensemble


def check_members(model: nn.Module, who: str) -> None:
    """Raise `NotAnEnsembleError` unless ``model`` shows its members; the message says that ``who`` needs them."""
    missing = [name for name in ("member_logits", "aggregate") if not callable(getattr(model, name, None))]
    if missing and hasattr(getattr(model, "module", None), "member_logits"):
        raise NotAnEnsembleError(f"{who} looks inside an ensemble, which {type(model).__name__} hides: pass its .module")
    if missing:
        raise NotAnEnsembleError(
            f"{who} looks inside an ensemble, but {type(model).__name__} has no {' and no '.join(missing)}: "
            "pass ensemble_attacks.Ensemble([...], vote=...), or as_ensemble(model, members=[...], vote=...)"
        )


def member_probabilities(model: nn.Module) -> Tensor | None:
    """Return the probabilities, (M,), of a model that draws a member for each answer; ``None`` where it does not name them.

    Such a model has ``member_logits(x) -> (M, N, K)`` and ``probabilities``, (M,), that sum to 1.
    """
    probabilities = getattr(model, "probabilities", None)
    return probabilities if isinstance(probabilities, Tensor) and hasattr(model, "member_logits") else None
