"""Read what scores say: pure functions of logits, with one value per sample.

Shape suffixes: M members, N samples, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.devices import at_hand


def gather(scores: Tensor, classes_N: Tensor) -> Tensor:
    """Return the score of one class per sample: (..., N, K), (N,) -> (..., N)."""
    return scores.gather(-1, classes_N.expand(scores.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def mask_class(scores: Tensor, classes_N: Tensor) -> Tensor:
    """Return ``scores`` (..., N, K) with -inf at one class per sample."""
    at_class = F.one_hot(classes_N, scores.shape[-1]).bool()
    return scores.masked_fill(at_class, -torch.inf)


def best_other(scores: Tensor, classes_N: Tensor) -> Tensor:
    """Return the best-scored class that is not the given one: (..., N, K) -> (..., N), int64."""
    return mask_class(scores, classes_N).argmax(-1)


def margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Return ``z_y - max_{j != y} z_j``, (..., N, K) -> (..., N), negative where the prediction is wrong beyond a tie."""
    return gather(scores, labels) - mask_class(scores, labels).amax(-1)


def targeted_margin(scores: Tensor, targets: Tensor) -> Tensor:
    """Return ``max_{j != t} z_j - z_t``, (..., N), negative exactly where the prediction is the target, beyond a tie."""
    return -margin(scores, targets)


def decided(scores_NK: Tensor) -> Tensor:
    """Return which samples have a prediction, (N,) bool: the best score is finite, and none is NaN.

    The logarithm of a mean probability may be -inf for a class that does not win.
    """
    return torch.isfinite(scores_NK.amax(1))  # NaN if any score is


FAR = 100.0  # spreads of an image's scores below the lowest finite one, where a class that cannot be lies


def bounded_below(scores: Tensor) -> Tensor:
    """Return scores (..., K) with a finite one far below all others in place of each that is -inf, where any is finite.

    Losses keep their gradients beside a class that cannot be (its probability is 0), where ``0 * -inf`` and ``-inf - -inf``
    would be NaN; a gradient that is NaN within the model, as that of the logarithm of an exact 0, stays so. Verdicts are
    given on the scores as they are.
    """
    absent = scores == -torch.inf
    if at_hand(absent) and not torch.compiler.is_compiling() and not absent.any():
        return scores
    detached = scores.detach()
    high = detached.amax(-1, keepdim=True)
    low = torch.where(absent, high, detached).amin(-1, keepdim=True)
    floor = (low - FAR * (high - low).clamp_min(1)).clamp_min(torch.finfo(scores.dtype).min / 4)
    return torch.where(absent & high.isfinite(), floor, scores)


SMALLEST_MARGIN = 1e-3  # of the scores' spread, or of 1: no score is divided by less, as at the boundary by 0
PROBABILITY = 1e-5  # how far their sum may be from 1


DIFFERENT = 1e-4  # of normalised scores in L2, beyond which two of them differ (AutoAttack's check_randomized)


def differ(scores_NK: Tensor, others_NK: Tensor) -> bool:
    """Tell whether the scores of any image are different, apart from their length, or other ones are -inf."""
    absent_NK = scores_NK == -torch.inf
    if not absent_NK.equal(others_NK == -torch.inf):
        return True
    scores_NK, others_NK = (z.masked_fill(absent_NK, 0) for z in (scores_NK, others_NK))
    unit, other = (z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in (scores_NK, others_NK))
    return bool(((unit - other).norm(dim=1) > DIFFERENT).any())


def are_probabilities(scores_NK: Tensor) -> bool:
    """Tell whether every image has scores of at least 0 that sum to 1 (AutoAttack's check_range_output)."""
    return bool(scores_NK.min() >= 0 and ((scores_NK.sum(1) - 1).abs() < PROBABILITY).all())


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """View (N,) as (N, 1, ..., 1), to broadcast over ``like``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def at_least(gaps: Tensor, scores: Tensor) -> Tensor:
    """Return gaps (...) between some of the ``scores`` (..., K), none so small that dividing by it would end in infinity."""
    spread = scores.amax(-1) - scores.amin(-1)
    spread = torch.where(spread > 0, spread.clamp(torch.finfo(scores.dtype).tiny ** 0.5, 1), 1)
    return gaps.maximum(SMALLEST_MARGIN * spread)
