"""Turn the members' logits into an ensemble's scores.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import unknown_name
from ensemble_attacks.models.aggregations import (
    expected_logits,
    gaps,
    log_expected_softmax,
    log_mean_softmax,
    log_soft_votes,
    log_votes,
    mean_logits,
    shares,
)
from ensemble_attacks.models.ask import ask_aggregate

Aggregate = Callable[[Tensor], Tensor]  # (M, N, K) -> (N, K)
Soft = Callable[[Tensor, float | Tensor], Tensor]  # (M, N, K) and the temperature of their softmax, (M, N, 1) -> (N, K)


@dataclass(frozen=True, eq=False)
class Vote:
    """A way to put members together, which also says what an attack has to know of it.

    Attributes:
        name: the name by which it is asked for.
        aggregate: the function from the members' logits (M, N, K) to the ensemble's scores (N, K).
        soft: what is differentiated in its place, a function of the members' logits and a temperature (`Soft`); ``None``:
            the scores themselves are differentiated.
        least: the least temperature. It is each member's gap between its two best logits, sample by sample, where that is
            more: so a hard vote (0) is followed more closely than at any fixed one, and members that are so sure of
            themselves that their probabilities have no gradient (1) keep theirs.
        masked: whether members that prefer another class already cannot change the vote (MORA, the indicator of eq. 11).
        linear: whether every member moves the scores alike, by 1 / M.
        counted: whether answers are counted, so that counts may tie.
        hard: whether the scores have no gradient, and that of the soft form is passed straight through.
        log_weights: the logarithm of the members' weights in the soft form, (M, N) or (M, 1), from their logits; ``None``:
            all weigh the same.
        seen: the members' logits as logits over the ensemble's classes (M, N, K), where they are over others; the soft form
            is a function of these.
        joined: what becomes of the members' logits where the vote also depends on the images (gates): a function of the
            images (N, ...) and the logits.
        modules: the networks that the vote itself holds.
        members: how many members it is made for; ``None``: any number.
    """

    name: str
    aggregate: Aggregate
    soft: Soft | None = None
    least: float = 1.0
    masked: bool = True
    linear: bool = False
    counted: bool = False
    hard: bool = False
    log_weights: Aggregate | None = None
    seen: Aggregate | None = None
    joined: Callable[[Tensor, Tensor], Tensor] | None = None
    modules: tuple[nn.Module, ...] = ()
    members: int | None = None
    known: dict[Any, Vote] = field(default_factory=dict, init=False, repr=False)  # its soft forms, by `softened`

    def over_classes(self, logits_MNK: Tensor) -> Tensor:
        """Return the members' logits over the ensemble's classes, (M, N, K)."""
        return logits_MNK if self.seen is None else self.seen(logits_MNK)

    def temperature(self, logits_MNK: Tensor) -> Tensor:
        """Return the temperature of the members' softmax (MORA, eq. 10: tau), (M, N, 1)."""
        return gaps(logits_MNK).clamp_min(self.least)

    def tied(self, logits_MNK: Tensor) -> Tensor:
        """Return the samples whose counts tie, (N,) bool."""
        if not self.counted:
            return torch.zeros(logits_MNK.shape[1], dtype=torch.bool, device=logits_MNK.device)
        weights_M = None if self.log_weights is None else self.log_weights(logits_MNK)[:, 0].exp()
        share_NK = shares(self.over_classes(logits_MNK), weights_M)
        return (share_NK >= share_NK.amax(1, keepdim=True) - EQUAL).sum(1) > 1


EQUAL = 1e-6  # shares of votes that differ by no more are the same


def at_temperature(aggregate: Aggregate) -> Soft:
    """Return the soft form that is an aggregation of the logits divided by the temperature."""
    return partial(_at_temperature, aggregate)


def _at_temperature(aggregate: Aggregate, logits_MNK: Tensor, temperature: float | Tensor) -> Tensor:
    return aggregate(logits_MNK / temperature)


SOFTMAX = Vote("softmax", log_mean_softmax, soft=at_temperature(log_mean_softmax))
VOTING = Vote("voting", log_votes, soft=SOFTMAX.soft, least=0.0, counted=True)
LOGITS = Vote("logits", mean_logits, masked=False, linear=True)
SOFT_VOTES = Vote("soft votes", log_soft_votes, soft=SOFTMAX.soft, least=0.0)  # no ensemble's, but a surrogate's
VOTES: dict[str, Vote] = {vote.name: vote for vote in (SOFTMAX, VOTING, LOGITS)}
MORE: dict[str, Vote] = {}  # those of pooled.py and routed.py, which need no settings
OWN = "own"  # the name of a vote that has none


def check_vote(vote: str | Vote) -> Vote:
    """Return the vote of a name, or the `Vote` itself.

    Raises:
        ValueError: Where the name is unknown; the message names the nearest one.
    """
    if isinstance(vote, Vote):
        return vote
    known = VOTES | MORE
    if vote not in known:
        raise unknown_name("vote", vote, known)
    return known[vote]


def log_weights_of(weights_M: Tensor | None) -> Aggregate | None:
    """Return what `Vote.log_weights` has to be for constant weights (M,)."""
    return None if weights_M is None else partial(_log_weights, weights_M)


def _log_weights(weights_M: Tensor, logits_MNK: Tensor) -> Tensor:
    return weights_M.to(logits_MNK).log().unsqueeze(-1)


def weighted(vote: str, weights: Sequence[float]) -> Vote:
    """Return a named vote with a weight for each member; only their ratios matter.

    ``"softmax"`` is ``log sum_m w_m softmax(z^m)``, ``"voting"`` counts each vote by its weight (`log_votes`), and
    ``"logits"`` is ``sum_m w_m z^m``, all with weights that sum to 1.

    Raises:
        TypeError: Where the vote is no name.
        ValueError: Where the name is unknown, a weight is negative or not finite, or all are 0.
    """
    if not isinstance(vote, str):
        raise TypeError(f"weights go with a named vote ({', '.join(WEIGHTED)}), not with {vote!r}: put them into the vote")
    if vote not in WEIGHTED:
        raise unknown_name("vote with weights", vote, WEIGHTED)
    values = [float(weight) for weight in weights]
    if not values or not all(math.isfinite(value) and value >= 0 for value in values) or not sum(values) > 0:
        raise ValueError(f"weights {values} must be finite numbers of at least 0, one for each member, and not all 0")
    weights_M = torch.tensor(values, dtype=torch.float64) / sum(values)
    aggregate, soft = (None if function is None else partial(function, weights_M) for function in WEIGHTED[vote])
    assert aggregate is not None
    tempered = None if soft is None else at_temperature(soft)
    return replace(
        VOTES[vote], aggregate=aggregate, soft=tempered, log_weights=log_weights_of(weights_M), members=len(values)
    )


def _softmax(weights_M: Tensor, logits_MNK: Tensor) -> Tensor:
    return log_expected_softmax(logits_MNK, weights_M)


def _voting(weights_M: Tensor, logits_MNK: Tensor) -> Tensor:
    return log_votes(logits_MNK, weights_M)


def _logits(weights_M: Tensor, logits_MNK: Tensor) -> Tensor:
    return expected_logits(logits_MNK, weights_M)


WEIGHTED = {"softmax": (_softmax, _softmax), "voting": (_voting, _softmax), "logits": (_logits, None)}


def as_vote(vote: str | Vote | Aggregate) -> Vote:
    """Return the `Vote` of a name, of a function (M, N, K) -> (N, K), or the `Vote` itself."""
    return Vote(OWN, partial(ask_aggregate, vote, called="vote")) if callable(vote) else check_vote(vote)


def vote_of(model: Any) -> Vote:
    """Return the vote of a model with ``aggregate``: the one that it names, or a `Vote` that holds its aggregation."""
    model = getattr(model, "counted", model)
    vote = getattr(model, "claimed", getattr(model, "vote", None))
    if isinstance(vote, Vote):
        return vote
    return check_vote(vote) if isinstance(vote, str) and vote in VOTES | MORE else as_vote(model.aggregate)
