"""Define step rules: how far to go along the gradient, and when to go back.

``momentum`` is the share of the new step in every move; the rest repeats the last one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ensemble_attacks.descent.balls import Ball
from ensemble_attacks.scores import per_sample


class StepRule:
    """A rule of how far to go, and from where.

    Subclasses give the `size` of a step, and may go back (`observe`). Attributes that are tensors have one row per sample.
    """

    momentum = 1.0
    first = 1.0  # the share of the new step in the first move

    def __init__(self, x: Tensor, *, eps: float, steps: int) -> None:
        self.eps, self.steps = eps, steps

    def size(self, step: int, x: Tensor) -> float | Tensor:
        """Return the size of the step, in the ball's norm: a number, or a tensor that broadcasts over ``x``."""
        raise NotImplementedError

    def observe(self, step: int, x: Tensor, loss: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Book the point just evaluated; return the point and gradient to go on from."""
        return x, gradient

    def move(
        self, step: int, ball: Ball, previous: Tensor, x: Tensor, gradient: Tensor, loss: Tensor, margin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the point gone on from and the next, (N, C, H, W) both."""
        x, gradient = self.observe(step, x, loss, gradient)
        ahead = ball.project(x + self.size(step, x) * ball.steepest(gradient))
        share = self.momentum if step else self.first
        return x, ball.project(x + share * (ahead - x) + (1 - share) * (x - previous))

    def select(self, rows: Tensor) -> None:
        """Forget the samples that left: keep these ``rows``."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])


class CosineSteps(StepRule):
    """A rule with MORA's schedule: ``a_i = eps (1 + cos(pi i / I))``, from twice eps down to 0 (MORA, Algorithm 1)."""

    momentum = 0.75

    def size(self, step: int, x: Tensor) -> float:
        return self.eps * (1 + math.cos(math.pi * step / self.steps))


class DecayingSteps(StepRule):
    """A rule with A3's schedule: half a cosine from eps to eps / 1000, or eps / 10 in up to ten steps (Liu et al. 2022)."""

    def size(self, step: int, x: Tensor) -> float:
        least = 0.1 if self.steps <= 10 else 0.001
        return self.eps * (least + (1 - least) * (1 + math.cos(math.pi * step / (self.steps + 1))) / 2)


class ConstantSteps(StepRule):
    """A rule with PGD's steps, which are always the same ``share`` of eps."""

    def __init__(self, x: Tensor, *, eps: float, steps: int, share: float) -> None:
        super().__init__(x, eps=eps, steps=steps)
        self.share = share

    def size(self, step: int, x: Tensor) -> float:
        return self.share * self.eps


class CheckpointSteps(StepRule):
    """A rule with APGD's schedule, which starts at twice eps (Croce & Hein 2020, section 3).

    At check-points that come ever closer, a sample whose loss rose in too few of the last steps (``rho``), or whose best
    loss and step size have both stood still, goes back to its best point with half the step size.
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
