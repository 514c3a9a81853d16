"""Adopt somebody else's ensemble: its own forward pass, and the members and vote that are claimed for it, which are checked.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import AggregateMismatchError
from ensemble_attacks.models.aggregations import straight_through, wants_gradient
from ensemble_attacks.models.ask import ask, ask_aggregate, ask_members, member_probabilities
from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.models.gradients import scores_and_gradient
from ensemble_attacks.models.preserve import private_random_state
from ensemble_attacks.models.softening import scores_of
from ensemble_attacks.models.votes import OWN, VOTES, Aggregate, Vote, as_vote, vote_of, weighted

FEW = 8  # images that say whether a model's scores have a gradient
CHECKED = 128  # images that are compared at once, where nothing else is said


class AdoptedEnsemble(Ensemble):
    """Somebody else's ensemble, which keeps its own forward pass and shows the members and vote that are claimed for it.

    All images on which an attack looks at the members are also put through the model itself, as are mixtures of the first
    ones, on which the members agree less; where the claimed members and vote predict otherwise, `AggregateMismatchError`
    says how often. Where the model's own scores have no gradient, that of the claimed ones is passed straight through, so
    that attacks that look at the scores alone can craft on it; the values are always the model's own.

    Attributes:
        refuted: on how many adversarial images the claim was false.
    """

    def __init__(
        self,
        original: nn.Module,
        members: Sequence[nn.Module],
        vote: str | Vote | Aggregate,
        weights: Sequence[float] | None = None,
    ) -> None:
        claimed = as_vote(vote) if weights is None else weighted(vote, weights)  # type: ignore[arg-type]
        super().__init__(members, claimed)
        self.original = original
        self.vote = None if claimed.name == OWN else claimed.name if isinstance(vote, str) else claimed
        self.claimed = claimed
        self.verified = False
        self.own_ties = False  # hard votes that tie have been seen to be broken otherwise: then the model itself decides
        self.refuted = 0
        self._checked = ""
        self._gradient: bool | None = None  # whether the model's own scores have one; not known before it is asked for
        self.training = self.members.training = original.training

    @property
    def vote_said(self) -> str:
        """Return the name of the claimed vote, for messages."""
        return "callable" if self.claimed.name == OWN else self.claimed.name

    @property
    def checked(self) -> str:
        """Return on how many images the claim was found true; empty before it is checked."""
        return self._checked

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", checked on {self._checked}" if self._checked else "")

    def forward(self, x: Tensor) -> Tensor:
        if not wants_gradient(x) or self.has_own_gradient(x):
            return ask(self.original, x)
        with torch.no_grad():
            scores_NK = ask(self.original, x)
        return straight_through(scores_NK, self.aggregate(super().member_logits(x)))

    def has_own_gradient(self, x: Tensor) -> bool:
        """Tell whether the model's own scores have a gradient, by the first images (N, ...) that it is asked about."""
        if self._gradient is None:
            self._gradient = has_gradient(self.original, x[:FEW])
        return self._gradient

    def member_logits(self, x: Tensor) -> Tensor:
        if not self.verified:
            self.verify(x)
        return super().member_logits(x)

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return scores_of(self.claimed, logits_MNK)

    @torch.no_grad()
    def _compare(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the claimed members and vote predict another class than the model itself; two tensors (N,) bool.

        The first holds the samples whose votes do not tie, the second those whose votes do.
        """
        logits_MNK = super().member_logits(x)
        differ = _predict_otherwise(ask(self.original, x), self.aggregate(logits_MNK))
        tied = self.claimed.tied(logits_MNK)
        return differ & ~tied, differ & tied

    def verify(self, x: Tensor, batch_size: int | None = None) -> None:
        """Raise `AggregateMismatchError` unless members and vote reproduce the model's own predictions on ``x`` (N, ...).

        The first time, mixtures of the images are compared, too. The model may break ties of hard votes as it likes: samples
        whose votes tie are not compared.
        """
        parts = x.split(batch_size or CHECKED)
        shares = () if self.verified else (0.3, 0.5, 0.7)
        mixtures = [share * part + (1 - share) * part.roll(1, 0) for share in shares for part in parts]
        differ, ties = (torch.cat(found) for found in zip(*map(self._compare, (*parts, *mixtures)), strict=True))
        if differ.any():
            raise AggregateMismatchError(
                f"the claimed members and vote={self.vote_said!r} predict another class than the model itself on "
                f"{int(differ[: len(x)].sum())} of {len(x)} images and {int(differ[len(x) :].sum())} of "
                f"{len(differ) - len(x)} mixtures of them: name the right vote ({', '.join(VOTES)}, or a callable "
                "(M, N, K) -> (N, K)), and members that take the same input as the model (any preprocessing included). A "
                "random model differs from itself: freeze its draws"
            )
        self._checked = f"{len(x)} images and {len(differ) - len(x)} mixtures of them" if shares else self._checked
        self.verified, self.own_ties = True, self.own_ties or bool(ties.any())

    def mismatches(self, x: Tensor, batch_size: int | None = None) -> list[int]:
        """Return the images (N, ...) on which the claim is false, by their indices."""
        apart, ties = (torch.cat(found) for found in zip(*map(self._compare, x.split(batch_size or CHECKED)), strict=True))
        if not self.verified:
            self.own_ties = self.own_ties or bool(ties.any())
        return torch.nonzero(apart if self.own_ties else apart | ties).squeeze(-1).tolist()

    def warn_of_mismatch(self, x_adv: Tensor, batch_size: int | None = None) -> None:
        """Warn where the claim, true of the clean images, fails on adversarial ones, and count these (``refuted``)."""
        differ = self.mismatches(x_adv, batch_size)
        self.refuted += len(differ)
        if differ:
            warnings.warn(
                f"on {len(differ)} of {len(x_adv)} adversarial images (the first: {differ[:5]}) the claimed members and "
                f"vote={self.vote_said!r} predict another class than the model itself: the vote claimed for it is "
                "not quite its own, and the attack was misled",
                stacklevel=2,
            )


def has_gradient(model: nn.Module, x: Tensor) -> bool:
    """Tell whether the model's scores of some images (N, ...) change with these, as far as autograd knows."""

    def lead(scores_NK: Tensor) -> Tensor:
        top_N2 = scores_NK.topk(2, -1).values
        return (top_N2[:, 0] - top_N2[:, 1]).sum()

    with private_random_state(0, model):
        _, gradient = scores_and_gradient(model, x, lead)
    return gradient is not None and bool((gradient != 0).any())


@torch.no_grad()
def check_protocol(model: Any, x: Tensor, batch_size: int | None = None) -> None:
    """Raise `AggregateMismatchError` where ``aggregate(member_logits(x))`` predicts otherwise than the model itself.

    All images (N, ...) are compared, in batches. Samples whose votes tie do not count; a random model, which differs from
    itself, is not checked, nor is one whose forward pass is `Ensemble`'s, with nothing hooked to it.
    """
    inner = getattr(model, "counted", model)
    if isinstance(inner, AdoptedEnsemble):
        inner.verify(x, batch_size)
    if isinstance(inner, AdoptedEnsemble) or member_probabilities(model) is not None or _is_plain(inner):
        return
    differing = 0
    for part in x.split(batch_size or CHECKED):
        logits_MNK, own_NK = ask_members(model, part), ask(model, part)
        differ = _predict_otherwise(own_NK, ask_aggregate(model.aggregate, logits_MNK, f"{type(inner).__name__}.aggregate"))
        differ &= ~vote_of(model).tied(logits_MNK)
        if differ.any() and not torch.equal(ask(model, part), own_NK):
            return
        differing += int(differ.sum())
    if differing:
        raise AggregateMismatchError(
            f"aggregate(member_logits(x)) of {type(inner).__name__} predicts another class than its forward on "
            f"{differing} of {len(x)} images: mend it (its members see no hook or preprocessing of the forward), "
            "or name members and vote: as_ensemble(model, members=[...], vote=...)"
        )


def _is_plain(model: nn.Module) -> bool:
    """Tell whether the forward pass is the aggregate of the members' logits by definition."""
    hooked = model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model)
    kind: Any = type(model)
    return kind.forward is Ensemble.forward and kind.member_logits is Ensemble.member_logits and not hooked


def false_claims(model: nn.Module, x: Tensor, batch_size: int, device: torch.device | str) -> int:
    """Return on how many images (N, ...) the claim for an adopted ensemble is false; 0 of any other, or a random, model."""
    inner = getattr(model, "counted", model)
    if not isinstance(inner, AdoptedEnsemble):
        return 0
    return _refuted(inner, x, batch_size, device, lambda images: len(inner.mismatches(images)))


def check_claim(model: nn.Module, x: Tensor, batch_size: int, device: torch.device | str) -> None:
    """Raise `AggregateMismatchError` where an attack on an adopted ensemble's scores would follow a false claim.

    That is where its own scores have no gradient, and the claimed members and vote, whose gradient stands in, predict
    otherwise on images (N, ...). Ties, which the model may break as it likes, and random models do not count.
    """
    inner = getattr(model, "counted", model)
    if not isinstance(inner, AdoptedEnsemble) or inner.has_own_gradient(x[:FEW].to(device)):
        return
    if count := _refuted(inner, x, batch_size, device, lambda images: int(inner._compare(images)[0].sum())):
        raise AggregateMismatchError(
            f"the scores have no gradient, and the members and vote={inner.vote_said!r} claimed for them predict another "
            f"class on {count} of {len(x)} images: name the right members and vote"
        )


@torch.no_grad()
def _refuted(
    model: AdoptedEnsemble, x: Tensor, batch_size: int, device: torch.device | str, count: Callable[[Tensor], int]
) -> int:
    """Return the sum of what ``count`` finds wrong in batches of images (N, ...); 0 of a model that differs from itself."""
    found = 0
    for part in x.split(batch_size):
        images = part.to(device)
        wrong = count(images)
        if wrong and not torch.equal(ask(model.original, images), ask(model.original, images)):
            return 0
        found += wrong
    return found


def _predict_otherwise(own_NK: Tensor, claimed_NK: Tensor) -> Tensor:
    """Return where a model's own scores and those claimed for it predict different classes, (N,) bool.

    Raises:
        AggregateMismatchError: Where the scores differ in shape.
    """
    if own_NK.shape != claimed_NK.shape:
        raise AggregateMismatchError(
            f"the model's scores have shape {tuple(own_NK.shape)}, those of the claimed members {tuple(claimed_NK.shape)}: "
            "claim a vote that gives the model's classes, a function (M, N, K) -> (N, K)"
        )
    return own_NK.argmax(1) != claimed_NK.argmax(1)
