"""Ask a model for scores and, of a value of these, for the gradient at its images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import out_of_memory
from ensemble_attacks.models.ask import ask


def scores_and_gradient(model: nn.Module, x: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return a model's scores (N, K) of images (N, ...), and the gradient of a value of the scores at these, (N, ...).

    The gradient is ``None`` where the scores have none: autograd does not know where they come from, or cannot follow.

    Args:
        model: images (N, ...) -> scores (N, K).
        x: the images.
        value: scores (N, K) -> a number.
    """
    images = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        try:
            scores_NK = ask(model, images)
        except RuntimeError as error:  # of an operation that has no gradient, such as numpy's
            if out_of_memory(error):
                raise
            return ask(model, images.detach()), None
        if not scores_NK.requires_grad:
            return scores_NK, None
        (gradient,) = torch.autograd.grad(value(scores_NK), images, allow_unused=True)
    return scores_NK.detach(), None if gradient is None else gradient.detach()
