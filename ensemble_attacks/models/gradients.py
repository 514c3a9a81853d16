"""Ask a model for scores and, of a value of these, for the gradient at its images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ensemble_attacks.errors import out_of_memory
from ensemble_attacks.models.ask import ask, device_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.scores import margin


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


def count_zero(gradient: Tensor | None, x: Tensor) -> int:
    """Return at how many of the images (N, ...) a gradient of `scores_and_gradient` is zero, or is not there."""
    return len(x) if gradient is None else int((gradient.flatten(1) == 0).all(1).sum())


def zero_gradients(model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int, seed: int) -> int:
    """Return at how many images (N, ...) with labels (N,) the gradient of a model's margin is zero, or is not there.

    Args:
        model: images -> scores (N, K); of one that is evaluated, what attacks craft on (`twins.prepare`).
        x, y: the images and labels.
        batch_size: the number of images per pass.
        seed: the seed of the model's own randomness.
    """
    device, count = device_of(model, x.device), 0
    with guarded(model, seed=seed):
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            given, classes = images.to(device), labels.to(device)
            _, gradient = scores_and_gradient(model, given, partial(_margins, classes))
            count += count_zero(gradient, given)
    return count


def _margins(labels: Tensor, scores_NK: Tensor) -> Tensor:
    return margin(scores_NK, labels).sum()
