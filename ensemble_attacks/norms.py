"""Define the threat model's norm, and the box that images live in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """A norm that perturbations are measured in.

    Attributes:
        name: the name by which it is asked for.
        order: the order that PyTorch's ``norm`` takes.
        dual: the order of the norm that slopes are measured in: no linear function grows faster than its slope's dual norm.
        gaussian: whether random starts are normal noise; else it is uniform in [-1, 1].
        attacked: whether this package's attacks know it; AutoAttack's know all.
    """

    name: str
    order: float
    dual: float
    gaussian: bool = True
    attacked: bool = True

    def size(self, delta: Tensor) -> Tensor:
        """Return the size of every sample's perturbation (N, ...), (N,)."""
        return delta.flatten(1).norm(self.order, dim=1)

    def dual_size(self, slope: Tensor) -> Tensor:
        """Return the size of every sample's slope (N, ...), in the dual norm, (N,)."""
        return slope.flatten(1).norm(self.dual, dim=1)


PART = 2**19  # how many values are looked at at once, so that what is asked of all images needs the memory of a few


def in_parts(images: Tensor) -> Iterator[slice]:
    """Yield slices of the images (N, ...), one after another, that hold at most `PART` values, or one image."""
    few = max(PART // max(images[:1].numel(), 1), 1)
    for first in range(0, len(images), few):
        yield slice(first, first + few)


LINF = Norm("Linf", float("inf"), 1, gaussian=False)
L2 = Norm("L2", 2, 2)
L1 = Norm("L1", 1, float("inf"), attacked=False)
NORMS: dict[str, Norm] = {norm.name: norm for norm in (LINF, L2, L1)}


def attacked_norms() -> list[str]:
    """Return the names of the norms that this package's attacks know."""
    return [name for name, norm in NORMS.items() if norm.attacked]


@dataclass(frozen=True)
class Box:
    """A box that holds the values that images can take, ``low <= x <= high``."""

    low: float = 0.0
    high: float = 1.0

    @property
    def width(self) -> float:
        return self.high - self.low

    def diameter(self, norm: str, image: Tensor) -> float:
        """Return the size of the largest perturbation that the box has room for, of an ``image`` (...)."""
        return NORMS[norm].size(torch.full((1, image.numel()), self.width, dtype=torch.double)).item()

    def inside(self, x: Tensor) -> Tensor:
        """Return ``x`` itself where it is in the box already, else as `clamp`."""
        within = all(bool((self.excess(x[part]) <= 0).all()) for part in in_parts(x))
        return x if within else self.clamp(x)

    def clamp(self, x: Tensor) -> Tensor:
        """Return ``x`` with what lies outside put on the edge."""
        return x.clamp(self.low, self.high)

    def excess(self, x: Tensor) -> Tensor:
        """Return by how much each sample (N, ...) leaves the box, (N,); not above 0 where it does not."""
        flat = x.flatten(1)
        return torch.maximum(self.low - flat, flat - self.high).amax(1)

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]"


UNIT = Box()
