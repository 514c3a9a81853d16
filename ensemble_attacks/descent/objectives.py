"""What attacks maximise: one value per sample.

Shape suffixes: M members, N samples, K classes. ``scores_NK`` are a model's outputs, ``logits_MNK`` its members'.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.models.view import Outputs
from ensemble_attacks.scores import gather, margin

SMALLEST_MARGIN = 1e-3  # of the scores' spread, or of 1: no score is divided by less, as at the boundary by 0


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


def lead(outputs: Outputs, labels: Tensor, targets: Tensor | None) -> Tensor:
    """By how much the best other class, or the one aimed at, leads the label's score, (N,): ``max_{j != y} z_j - z_y`` or
    ``z_t - z_y``.
    """
    if targets is None:
        return -margin(outputs.scores_NK, labels)
    return gather(outputs.scores_NK, targets) - gather(outputs.scores_NK, labels)
