"""One call of anybody's model: what goes in, and what must come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ensemble_attacks.validation import check_member_logits, check_scores


def ask(model: Callable[[Tensor], Tensor], x: Tensor, called: str | None = None) -> Tensor:
    """The scores (N, K) of a model, ``called`` so in errors, of images (N, ...), with a copy of which it may do as it likes.

    Raises:
        TypeError, ValueError: it returns something else; says what, and the remedy.
    """
    scores_NK = model(x.clone())
    check_scores(scores_NK, len(x), called or type(model).__name__)
    return scores_NK


def ask_members(model: Any, x: Tensor) -> Tensor:
    """The logits of an ensemble's members, (M, N, K); otherwise as `ask`."""
    logits_MNK = model.member_logits(x.clone())
    check_member_logits(logits_MNK, len(x), type(model).__name__)
    return logits_MNK
