"""The threat model's ball, intersected with the [0, 1] box, around clean images.

A projected image is inside the ball to the last bit: measured in float64, ``|x_adv - x| <= eps`` and ``0 <= x_adv <= 1``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ensemble_attacks.scores import per_sample

ROUNDINGS = 4  # tries to come as close to the boundary as half precision can


def l2_norm(x: Tensor) -> Tensor:
    """Euclidean norm of every sample, (N,)."""
    return x.flatten(1).norm(dim=1)


class LinfBall:
    """``max |x - clean| <= eps``. Projection is one clamp: box and ball are both intervals."""

    def __init__(self, clean: Tensor, eps: float) -> None:
        self.clean, self.eps = clean, eps
        exact = clean.double()
        lower = (exact - eps).clamp_min(0).to(clean.dtype)
        upper = (exact + eps).clamp_max(1).to(clean.dtype)
        # Rounding to the images' dtype may step outside: then take the neighbour inside.
        self.lower = torch.where(exact - lower.double() > eps, _neighbour(lower, +1), lower)
        self.upper = torch.where(upper.double() - exact > eps, _neighbour(upper, -1), upper)

    def project(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.lower, self.upper)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of unit Linf norm along which a linear function with this gradient grows fastest."""
        return gradient.sign()

    def start(self, noise: Tensor) -> Tensor:
        """A point on the sphere from uniform noise in [-1, 1]: ``P(clean + eps * t / max |t|)``."""
        largest = noise.flatten(1).abs().amax(1)
        return self.project(self.clean + self.eps * noise / per_sample(largest, noise))

    def select(self, rows: Tensor) -> LinfBall:
        """The ball of some of the samples."""
        part = object.__new__(LinfBall)
        part.clean, part.eps, part.lower, part.upper = self.clean[rows], self.eps, self.lower[rows], self.upper[rows]
        return part


class L2Ball:
    """``|x - clean|_2 <= eps``. The box is convex and holds the centre, so clamping to it never leaves the ball."""

    def __init__(self, clean: Tensor, eps: float) -> None:
        self.clean, self.eps = clean, eps
        # Room for the rounding of every pixel of clean + delta and of the norm itself.
        unit = torch.finfo(clean.dtype).eps / 2
        self.radius = eps * (1 - 16 * unit) - unit * clean[0].numel() ** 0.5
        if self.radius <= 0:
            raise ValueError(
                f"eps {eps} is below what {clean.dtype} can resolve in L2 on {clean[0].numel()} pixels: use float32"
            )

    def project(self, x: Tensor) -> Tensor:
        if self.radius > 0.99 * self.eps:
            return self._shrunk(x, self.clean, x.new_full((len(x),), self.radius))
        # In half precision that room is a good part of the ball: round what was computed in more, and shrink what left it.
        clean, within = self.clean.double(), torch.full((len(x),), self.eps, dtype=torch.double, device=x.device)
        for _ in range(ROUNDINGS):
            rounded = self._shrunk(x.double(), clean, within).to(x.dtype)
            size = l2_norm(rounded.double() - clean)
            if not (size > self.eps).any():
                return rounded
            within = torch.where(size > self.eps, within * (self.eps / size) * (1 - torch.finfo(x.dtype).eps), within)
        safe = self._shrunk(x, self.clean, x.new_full((len(x),), self.radius))
        return torch.where(per_sample(size > self.eps, x), safe, rounded)

    @staticmethod
    def _shrunk(x: Tensor, clean: Tensor, radius_N: Tensor) -> Tensor:
        delta = x - clean
        scale = radius_N / l2_norm(delta).maximum(radius_N)
        return (clean + delta * per_sample(scale, delta)).clamp(0, 1)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Direction of unit L2 norm along which a linear function with this gradient grows fastest."""
        largest = gradient.flatten(1).abs().amax(1)  # taken out first: the squares of a tiny gradient are 0
        scaled = gradient / per_sample(torch.where(largest > 0, largest, 1), gradient)
        return scaled / per_sample(l2_norm(scaled).clamp_min(1), gradient)

    def start(self, noise: Tensor) -> Tensor:
        """A point on the sphere from normal noise: ``P(clean + eps * t / |t|_2)``."""
        return self.project(self.clean + self.eps * self.steepest(noise))

    def select(self, rows: Tensor) -> L2Ball:
        """The ball of some of the samples."""
        part = object.__new__(L2Ball)
        part.clean, part.eps, part.radius = self.clean[rows], self.eps, self.radius
        return part


Ball = LinfBall | L2Ball


def make_ball(norm: str, clean: Tensor, eps: float) -> Ball:
    """The ball of radius ``eps`` (pixel units of [0, 1]) in ``norm`` around ``clean`` (N, ...)."""
    return LinfBall(clean, eps) if norm == "Linf" else L2Ball(clean, eps)


def _neighbour(x: Tensor, step: int) -> Tensor:
    """The next representable number above (+1) or below (-1); ``x`` is non-negative, so its bits are ordered."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(bits) + step).view(x.dtype)
