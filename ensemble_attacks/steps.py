"""Step rules: how far to go along the gradient, and when to go back.

``momentum`` is the share of the new step in every move; the rest repeats the last one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensemble_attacks.projections import per_sample


class _Fixed:
    """A step size that depends on nothing but the step."""

    momentum = 1.0

    def __init__(self, x: Tensor, *, eps: float, steps: int) -> None:
        self.eps, self.steps = eps, steps

    def observe(self, step: int, x: Tensor, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return x, gradient

    def select(self, rows: Tensor) -> None:
        """No per-sample state."""

    def size(self, step: int, x: Tensor) -> float:
        raise NotImplementedError


class CosineSteps(_Fixed):
    """MORA's schedule: ``a_i = eps (1 + cos(pi i / I))``, from twice eps down to 0 (MORA, Algorithm 1)."""

    momentum = 0.75

    def size(self, step: int, x: Tensor) -> float:
        return self.eps * (1 + math.cos(math.pi * step / self.steps))


class DecayingSteps(_Fixed):
    """A3's schedule: along half a cosine from eps to eps / 1000, or eps / 10 in ten steps or fewer (Liu et al. 2022)."""

    def size(self, step: int, x: Tensor) -> float:
        least = 0.1 if self.steps <= 10 else 0.001
        return self.eps * (least + (1 - least) * (1 + math.cos(math.pi * step / (self.steps + 1))) / 2)


class ConstantSteps(_Fixed):
    """PGD's: always the same share of eps."""

    def __init__(self, x: Tensor, *, eps: float, steps: int, share: float) -> None:
        super().__init__(x, eps=eps, steps=steps)
        self.share = share

    def size(self, step: int, x: Tensor) -> float:
        return self.share * self.eps


class CheckpointSteps:
    """APGD's schedule (Croce & Hein 2020, section 3): starts at twice eps; at check-points that come ever closer, a
    sample whose loss rose in too few of the last steps (``rho``), or whose best loss and step size have both stood still,
    goes back to its best point with half the step size.
    """

    momentum = 0.75  # Croce & Hein 2020, eq. 4

    def __init__(self, x: Tensor, *, eps: float, steps: int, rho: float = 0.75) -> None:
        self.rho = rho
        self.period = max(int(0.22 * steps), 1)
        self.shortest, self.shrink = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
        self.since_check = 0
        n = len(x)
        self.sizes = x.new_full((n,), 2 * eps)
        self.rises = x.new_zeros(n)
        self.reduced = torch.ones(n, dtype=torch.bool, device=x.device)
        self.loss: Tensor | None = None

    def observe(self, step: int, x: Tensor, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Book the point just evaluated; return the point and gradient to go on from."""
        if self.loss is None:
            self.loss, self.best_loss, self.checked_loss = loss, loss, loss
            self.best_x, self.best_gradient = x, gradient
            return x, gradient
        self.rises = self.rises + (loss > self.loss)
        self.loss = loss
        better = loss > self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_x = torch.where(per_sample(better, x), x, self.best_x)
        self.best_gradient = torch.where(per_sample(better, x), gradient, self.best_gradient)
        self.since_check += 1
        if self.since_check < self.period:
            return x, gradient
        stalled = ~self.reduced & (self.checked_loss >= self.best_loss)
        back = (self.rises <= self.rho * self.period) | stalled
        self.sizes = torch.where(back, self.sizes / 2, self.sizes)
        self.reduced, self.checked_loss = back, self.best_loss
        self.rises = torch.zeros_like(self.rises)
        self.since_check, self.period = 0, max(self.period - self.shrink, self.shortest)
        rows = per_sample(back, x)
        return torch.where(rows, self.best_x, x), torch.where(rows, self.best_gradient, gradient)

    def size(self, step: int, x: Tensor) -> Tensor:
        return per_sample(self.sizes, x)

    def select(self, rows: Tensor) -> None:
        """Forget the samples that left: every tensor here has one row per sample."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])


StepRule = _Fixed | CheckpointSteps
