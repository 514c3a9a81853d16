"""Define the threat model's ball, intersected with the box, around clean images.

A projected image is inside both to the last bit: measured in float64, ``|x_adv - x| <= eps`` and ``low <= x_adv <= high``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ensemble_attacks.devices import at_hand
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.scores import per_sample

ROUNDINGS = 4  # tries to come as close to the boundary as half precision can


def l2_norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of every sample, (N,)."""
    return x.flatten(1).norm(dim=1)


class Ball:
    """A ball ``|(x - clean) / scale| <= eps`` within a box, in a norm whose name subclasses give.

    Args:
        clean: the centres, (N, ...), in the box.
        eps: the radius, in the units of the images, or of the ``scale``.
        box: the values that images can take.
        scale: the radius of each feature beside the others', which broadcasts over ``clean``: 0 where nothing may move;
            ``None``: 1 everywhere.
    """

    known: ClassVar[dict[str, type[Ball]]] = {}  # by the norm's name

    def __init_subclass__(cls, norm: str, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.known[norm] = cls

    def __init__(self, clean: Tensor, eps: float, box: Box = UNIT, scale: Tensor | None = None) -> None:
        self.clean, self.eps, self.box = clean, eps, box
        self.scale = None if scale is None else scale.to(clean.device).expand_as(clean)

    def scaled(self, x: Tensor) -> Tensor:
        """Return ``x`` (N, ...) times the scale: of a slope, how fast a function grows in the ball's own units."""
        return x if self.scale is None else x * self.scale.to(x.dtype)

    def project(self, x: Tensor) -> Tensor:
        """Return the points (N, ...) put into the ball and the box."""
        raise NotImplementedError

    def steepest(self, gradient: Tensor) -> Tensor:
        """Return the direction of unit norm along which a linear function with this gradient grows fastest."""
        raise NotImplementedError

    def start(self, noise: Tensor) -> Tensor:
        """Return a point on the sphere, put into the box, from noise of the norm's kind, (N, ...)."""
        raise NotImplementedError

    def uniform(self, noise: Tensor) -> Tensor:
        """Return a point anywhere in the ball, put into the box; where a norm does not say how, as `start` does."""
        return self.start(noise)

    def select(self, rows: Tensor) -> Ball:
        """Return the ball of some of the samples."""
        part = object.__new__(type(self))
        for name, value in vars(self).items():
            setattr(part, name, value[rows] if isinstance(value, Tensor) else value)
        return part


class LinfBall(Ball, norm="Linf"):
    """A ball ``max |x - clean| <= eps``, onto which projection is one clamp: box and ball are both intervals."""

    def __init__(self, clean: Tensor, eps: float, box: Box = UNIT, scale: Tensor | None = None) -> None:
        super().__init__(clean, eps, box, scale)
        exact = clean.double()
        reach = eps if self.scale is None else eps * self.scale.double()
        lower, upper = box.clamp(exact - reach).to(clean.dtype), box.clamp(exact + reach).to(clean.dtype)
        # Rounding to the images' dtype may step outside: then take the neighbour inside.
        self.lower = torch.where(exact - lower.double() > reach, _neighbour(lower, +1), lower)
        self.upper = torch.where(upper.double() - exact > reach, _neighbour(upper, -1), upper)

    def project(self, x: Tensor) -> Tensor:
        return torch.clamp(x, self.lower, self.upper)

    def steepest(self, gradient: Tensor) -> Tensor:
        return self.scaled(gradient.sign())

    def start(self, noise: Tensor) -> Tensor:
        """Return ``P(clean + eps * t / max |t|)`` of uniform noise t in [-1, 1]."""
        largest = noise.flatten(1).abs().amax(1)
        return self.project(self.clean + self.scaled(self.eps * noise / per_sample(largest, noise)))

    def uniform(self, noise: Tensor) -> Tensor:
        """Return ``P(clean + eps * t)`` of uniform noise t in [-1, 1]."""
        return self.project(self.clean + self.scaled(self.eps * noise))


class L2Ball(Ball, norm="L2"):
    """A ball ``|x - clean|_2 <= eps``, whose projection clamps to the box last.

    The box is convex and holds the centre, so clamping to it never leaves the ball.

    Raises:
        ValueError: Where ``eps`` is below what the images' type can resolve.
    """

    def __init__(self, clean: Tensor, eps: float, box: Box = UNIT, scale: Tensor | None = None) -> None:
        super().__init__(clean, eps, box, scale)
        # Room for the rounding of every pixel of clean + delta and of the norm itself.
        unit = torch.finfo(clean.dtype).eps / 2
        features = clean[0].numel() ** 0.5 if self.scale is None else self._most_units()
        self.radius = eps * (1 - 16 * unit) - unit * box.magnitude * features
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
            size = l2_norm(self._units(rounded.double() - clean))
            if at_hand(size) and not (size > self.eps).any():
                return rounded
            within = torch.where(size > self.eps, within * (self.eps / size) * (1 - torch.finfo(x.dtype).eps), within)
        safe = self._shrunk(x, self.clean, x.new_full((len(x),), self.radius))
        return torch.where(per_sample(size > self.eps, x), safe, rounded)

    def _shrunk(self, x: Tensor, clean: Tensor, radius_N: Tensor) -> Tensor:
        delta = x - clean
        if self.scale is not None:
            delta = delta.masked_fill(self.scale == 0, 0)
        share_N = radius_N / l2_norm(self._units(delta)).maximum(radius_N)
        return self.box.clamp(clean + delta * per_sample(share_N, delta))

    def _units(self, delta: Tensor) -> Tensor:
        """Return perturbations (N, ...) in the ball's own units, in which it is round; 0 where nothing may move."""
        if self.scale is None:
            return delta
        scale = self.scale.to(delta.dtype)
        return torch.where(scale > 0, delta / scale, 0)

    def _most_units(self) -> float:
        """Return the size of a perturbation by 1 of all that may move, in the ball's units, the largest of any sample."""
        return l2_norm(self._units(torch.ones_like(self.clean))).amax().item()

    def steepest(self, gradient: Tensor) -> Tensor:
        gradient = self.scaled(gradient)
        largest = gradient.flatten(1).abs().amax(1)  # taken out first: the squares of a tiny gradient are 0
        scaled = gradient / per_sample(torch.where(largest > 0, largest, 1), gradient)
        return self.scaled(scaled / per_sample(l2_norm(scaled).clamp_min(1), gradient))

    def start(self, noise: Tensor) -> Tensor:
        """Return ``P(clean + eps * t / |t|_2)`` of normal noise t."""
        return self.project(self.clean + self.eps * self.steepest(noise))


def make_ball(norm: str, clean: Tensor, eps: float, box: Box = UNIT, scale: Tensor | None = None) -> Ball:
    """Return the ball of radius ``eps`` in ``norm``, within ``box``, around ``clean`` (N, ...), in the ``scale``'s units."""
    return Ball.known[norm](clean, eps, box) if scale is None else Ball.known[norm](clean, eps, box, scale)


def _neighbour(x: Tensor, step: int) -> Tensor:
    """Return the next representable number above (+1) or below (-1): the bits, but for the sign, are ordered."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = x.view(kind)
    return torch.where(bits < 0, bits - step, bits + step).view(x.dtype)
