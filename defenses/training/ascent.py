"""Make images while training, by signed gradient steps in an Linf ball."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from defenses.training.plan import Batch
from ensemble_attacks.models.votes import log_mean_softmax

STEPS = 10


def sign_ascent(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    eps: float,
    step: float,
    start: Tensor | None = None,
    momentum: float = 0.0,
    steps: int = STEPS,
) -> Tensor:
    """Maximise ``objective`` (images (N, C, H, W) -> (N,)) over the eps-ball around ``x`` and the [0, 1] box.

    Each step is ``x <- clip(x + step * sign(g))``, with ``g <- momentum * g + gradient / |gradient|_1`` (Dong et al. 2018,
    eq. 6-7).
    """
    adversarial = x if start is None else start
    accumulated = torch.zeros_like(x)
    for _ in range(steps):
        adversarial = adversarial.detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(adversarial).sum(), adversarial)
        accumulated = momentum * accumulated + F.normalize(gradient.flatten(1), p=1).view_as(x)
        adversarial = adversarial.detach() + step * accumulated.sign()
        adversarial = torch.minimum(torch.maximum(adversarial, x - eps), x + eps).clamp(0, 1)
    return adversarial.detach()


def pgd(batch: Batch, member: int | None = None) -> Tensor:
    """Return images of PGD-10 (Madry et al. 2018) on the mean probability, or on one member's; (N, C, H, W).

    It starts at random, and takes steps of eps / 4.
    """

    def objective(x: Tensor) -> Tensor:
        scores_NK = log_mean_softmax(batch.logits(x)) if member is None else batch.logits(x, member)
        return F.cross_entropy(scores_NK, batch.y, reduction="none")

    eps = batch.data.eps
    noise = 2 * torch.rand(batch.x.shape, generator=batch.generator) - 1
    start = (batch.x + eps * noise.to(batch.x)).clamp(0, 1)
    with batch.crafting():
        return sign_ascent(objective, batch.x, eps=eps, step=eps / 4, start=start)
