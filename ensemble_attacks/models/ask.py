"""Call anybody's model: check what goes in, and what must come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ensemble_attacks.validation import check_member_logits, check_scores


def ask(model: Callable[[Tensor], Tensor], x: Tensor, called: str | None = None) -> Tensor:
    """Return the scores (N, K) that a model gives to images (N, ...), of which it gets a copy that it may change.

    Args:
        model: images (N, ...) -> scores (N, K).
        x: the images.
        called: the name of the model in errors; ``None``: the name of its type.

    Raises:
        TypeError, ValueError: Where the model returns something else; the message says what, and the remedy.
    """
    scores_NK = model(x.clone())
    check_scores(scores_NK, len(x), called or type(model).__name__)
    return scores_NK


def ask_members(model: Any, x: Tensor) -> Tensor:
    """Return the logits of an ensemble's members, (M, N, K), for images (N, ...), of which it gets a copy, as in `ask`.

    Raises:
        ValueError: Where ``member_logits`` returns something else.
    """
    logits_MNK = model.member_logits(x.clone())
    check_member_logits(logits_MNK, len(x), type(model).__name__)
    return logits_MNK


@torch.no_grad()
def check_dtype(model: Callable[[Tensor], object], images: Tensor, name: str = "images") -> None:
    """Raise a `TypeError` where images are not of the type that the model computes in, unless it converts them itself."""
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    own = next((p.dtype for p in parameters if p.is_floating_point()), images.dtype)
    if own == images.dtype or not len(images):
        return
    parameter = next(model.parameters()) if isinstance(model, nn.Module) else images
    try:
        model(images[:1].to(parameter.device, copy=True))
    except RuntimeError as error:
        raise TypeError(f"{name} has dtype {images.dtype}, the model {own}: pass {name}.to({own})") from error
