"""Implement ``crossmax``: the robust aggregation of Fort & Lakshminarayanan, "Ensemble Everything Everywhere: Multi-scale
Aggregation for Adversarial Robustness" (arXiv:2408.05446, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ensemble_attacks.models.ensembles import Ensemble
from ensemble_attacks.validation import check_count


def crossmax(logits_MNK: Tensor, k: int | None = None) -> Tensor:
    """Return CrossMax scores (N, K), at most 0, of logits (M, N, K).

    From every predictor's logits their largest over classes is taken off, then from every class its largest over predictors;
    the score is the ``k``-th largest over predictors of what is left, the median (the lower one of an even number) if ``k``
    is ``None``.
    """
    relative_MNK = logits_MNK - logits_MNK.amax(-1, keepdim=True)
    relative_MNK = relative_MNK - relative_MNK.amax(0, keepdim=True)
    if k is None:
        return relative_MNK.median(0).values
    return relative_MNK.topk(k, dim=0).values[-1]


class CrossMax(Ensemble):
    """An ensemble of classifiers that decide by CrossMax.

    Args:
        members: modules (N, C, H, W) -> (N, K).
        k: which of the predictors' scores counts, 1 the largest; ``None``: the median, as for equivalent models.

    Raises:
        ValueError: Where ``k`` is less than 1 or more than there are members.
    """

    def __init__(self, members: Sequence[nn.Module], k: int | None = None) -> None:
        super().__init__(members)
        check_k(k, len(self.members))
        self.k = k
        self.vote = None

    def aggregate(self, logits_MNK: Tensor) -> Tensor:
        return crossmax(logits_MNK, self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}"


def check_k(k: int | None, predictors: int) -> None:
    if k is not None:
        check_count("k", k)
        if k > predictors:
            raise ValueError(f"k must be at most {predictors}, the number of predictors, got {k}")
