"""What one look at a model shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """What one forward pass shows.

    Attributes:
        scores_NK: what is differentiated: the model's scores, or its surrogate's.
        logits_MNK: the members', of an ensemble.
        verdict_ENK: the scores that decide success, where they are others: of each outcome, by the ``weights_E`` that sum
            to 1, of a model that is random, or of the one outcome of a model that a surrogate stands for.
    """

    scores_NK: Tensor
    logits_MNK: Tensor | None = None
    verdict_ENK: Tensor | None = None
    weights_E: Tensor | None = None


Forward = Callable[[Tensor], Outputs]
