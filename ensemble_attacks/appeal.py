"""Ask again, otherwise, about images that a judge finds robust: an honest model answers the same, however it is asked."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ensemble_attacks.devices import full_precision
from ensemble_attacks.errors import out_of_memory, reason
from ensemble_attacks.models.ask import ask, device_of
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.models.passes import uncounted
from ensemble_attacks.scores import decided

logger = logging.getLogger(__name__)
SINGLE = 32  # images, at most, that are also asked about one by one
ROUNDING = 1e-2  # of the largest score: batches of another size, other kernels, and folded models round otherwise


def contradicted(model: nn.Module, images: Tensor, *, batch_size: int = 250, seed: int = 0) -> Tensor:
    """Return on which images a model answers otherwise when it is asked in another way than a judge does, (N,) bool.

    It is asked with a gradient wanted, as attacks do, and about the first `SINGLE` images one by one; its scores must be
    the same but for rounding. Where it raises then, or answers otherwise when it is asked the same twice, as a random model
    does, nothing follows.

    Args:
        model: images (N, ...) -> scores (N, K).
        images: (N, ...).
        batch_size: the number of images per pass.
        seed: the seed of the model's own randomness.
    """
    found = torch.zeros(len(images), dtype=torch.bool)
    if not len(images):
        return found
    device = device_of(model, images.device)

    def scores(part: Tensor, size: int, gradient: bool) -> Tensor:
        with torch.set_grad_enabled(gradient):
            asked = (batch.to(device).clone().requires_grad_(gradient) for batch in part.detach().split(size))
            return torch.cat([ask(model, batch).detach().cpu() for batch in asked])

    with guarded(model, seed=seed), full_precision(), uncounted(model):
        plain, again = (_attempted(lambda: scores(images, batch_size, False)) for _ in range(2))
        if plain is None or again is None or otherwise(again, plain).any():
            return found
        with_gradient = _attempted(lambda: scores(images, batch_size, True))
        alone = _attempted(lambda: scores(images[:SINGLE], 1, False))
    for answer in (with_gradient, alone):
        if answer is not None:
            found[: len(answer)] |= otherwise(answer, plain[: len(answer)])
    return found


def otherwise(scores_NK: Tensor, others_NK: Tensor) -> Tensor:
    """Return which samples have other scores than before, beyond rounding, or only once a sound best one, (N,) bool."""
    gap_N = (scores_NK - others_NK).abs().nan_to_num(posinf=0).amax(1)
    return (decided(scores_NK) != decided(others_NK)) | beyond_rounding(gap_N, others_NK)


def _attempted(work: Callable[[], Tensor]) -> Tensor | None:
    """Return the scores that ``work`` gets; ``None`` where the model cannot be asked so."""
    try:
        return work()
    except Exception as error:  # whatever a model raises that is asked otherwise
        if out_of_memory(error):
            raise
        logger.debug("not asked again: %s", reason(error))
        return None


def beyond_rounding(gap_N: Tensor, scores_NK: Tensor) -> Tensor:
    """Return which gaps (N,) between scores are larger than rounding explains, (N,) bool; NaN is not."""
    largest = scores_NK.abs().nan_to_num(posinf=0).amax(1)
    return gap_N > max(ROUNDING, 8 * torch.finfo(scores_NK.dtype).eps) * largest
