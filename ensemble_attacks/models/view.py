"""Look at a model once, whatever kind of model it is.

Shape suffixes: M members, N samples, K classes, E outcomes of a random model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ensemble_attacks.models.aggregations import log_expected_softmax
from ensemble_attacks.models.ask import ask, ask_aggregate, ask_members, member_probabilities
from ensemble_attacks.models.surrogates import Surrogate
from ensemble_attacks.scores import bounded_below, differ
from ensemble_attacks.validation import check_one_each


class Outputs(NamedTuple):
    """A record of what one forward pass shows.

    Attributes:
        scores_NK: the scores that are differentiated: the model's, or its surrogate's.
        logits_MNK: the logits of an ensemble's members; ``None`` where they were not asked for, or there are none.
        verdict_ENK: the scores that decide success, where they are not ``scores_NK``: those of each outcome of a random
            model, or of the one outcome of the model that a surrogate stands for.
        weights_E: the probabilities of the outcomes, which sum to 1; ``None`` where there is one outcome.
    """

    scores_NK: Tensor
    logits_MNK: Tensor | None = None
    verdict_ENK: Tensor | None = None
    weights_E: Tensor | None = None


Forward = Callable[[Tensor], Outputs]


def look(model: Any, x: Tensor, *, inside: bool = False, expected: bool = False) -> Outputs:
    """Return the `Outputs` of one forward pass of images (N, ...), whose losses have gradients (`bounded_below`).

    Args:
        model: a classifier, an ensemble, or a `Surrogate`.
        x: the images.
        inside: whether the members of an ensemble are asked for.
        expected: whether the expectation over the members is taken, if the model draws them with known probabilities.
    """
    if isinstance(model, Surrogate):
        return _stand_in(model, x)
    if not inside and (not expected or member_probabilities(model) is None):
        return Outputs(bounded_below(ask(model, x)))
    logits_MNK, probabilities = _inside(model, x)
    if probabilities is not None:
        return Outputs(log_expected_softmax(logits_MNK, probabilities), logits_MNK, logits_MNK, probabilities)
    verdict_ENK = None
    if getattr(model, "own_ties", False):
        with torch.no_grad():
            verdict_ENK = ask(model, x).unsqueeze(0)
    return Outputs(_aggregated(model, logits_MNK), logits_MNK, verdict_ENK)


def _inside(model: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the members' logits (M, N, K), and the probabilities (M,) with which the model draws them, if it does."""
    logits_MNK, probabilities = bounded_below(ask_members(model, x)), member_probabilities(model)
    if probabilities is not None:
        check_one_each(probabilities, logits_MNK, type(model).__name__)
    return logits_MNK, probabilities


def _aggregated(model: Any, logits_MNK: Tensor) -> Tensor:
    return bounded_below(ask_aggregate(model.aggregate, logits_MNK, f"{type(model).__name__}.aggregate"))


def _stand_in(surrogate: Surrogate, x: Tensor) -> Outputs:
    """Return the surrogate's scores and those of the model it stands for, from one forward pass if it is an aggregation."""
    target, other = surrogate.target, surrogate.other
    if other is not None:
        with torch.no_grad():
            verdict_NK = ask(target, x)
        logits_MNK = bounded_below(ask_members(other, x)) if hasattr(other, "member_logits") else None
        scores_NK = bounded_below(ask(other, x)) if logits_MNK is None else _aggregated(other, logits_MNK)
        return Outputs(scores_NK, logits_MNK, verdict_NK.unsqueeze(0))
    logits_MNK, probabilities = _inside(target, x)
    scores_NK = _aggregated(surrogate, logits_MNK)
    if probabilities is not None:
        return Outputs(scores_NK, logits_MNK, logits_MNK, probabilities)
    verdict_NK = _aggregated(target, logits_MNK.detach())
    if scores_NK.shape != verdict_NK.shape:
        raise ValueError(
            f"the surrogate scores {scores_NK.shape[1]} classes, {type(target).__name__} {verdict_NK.shape[1]}: its members "
            "answer about other classes; pass a function (M, N, K) -> (N, K) that maps them, or attack with MORA or apgd-ce"
        )
    return Outputs(scores_NK, logits_MNK, verdict_NK.unsqueeze(0))


@torch.no_grad()
def is_exact(model: nn.Module, forward: Forward, image: Tensor) -> bool:
    """Tell whether the expectation over a random model can be taken exactly.

    It can if the model names its members' probabilities, also behind a surrogate that aggregates them, and if the members
    themselves are not random on an image (1, ...).
    """
    known: Any = model.target if isinstance(model, Surrogate) and model.other is None else model
    if member_probabilities(known) is None:
        return False
    first, second = (forward(image).logits_MNK for _ in range(2))
    if first is None or second is None:
        return False
    return not differ(first.flatten(1), second.flatten(1))
