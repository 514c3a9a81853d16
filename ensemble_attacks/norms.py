"""Define the threat model's norm, and the box that images live in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

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


Bound = float | Tensor


@dataclass(frozen=True, eq=False)
class Box:
    """A box that holds the values that inputs can take, ``low <= x <= high``.

    Attributes:
        low, high: numbers, or tensors that broadcast over one input (...), with a bound for each feature.

    Raises:
        TypeError, ValueError: Where a bound is no finite number, or ``low`` is not below ``high``. Single features may have
            no room.
    """

    low: Bound = 0.0
    high: Bound = 1.0

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            bound = getattr(self, name)
            if isinstance(bound, bool) or not isinstance(bound, (Real, Tensor)):
                raise TypeError(f"{name} of the box must be a number or a tensor, got {bound!r}"[:200])
            if not torch.isfinite(torch.as_tensor(bound)).all():
                raise ValueError(f"{name} of the box must be finite, got {bound!r}"[:200])
        room = torch.as_tensor(self.width)
        if (room < 0).any() or not (room > 0).any():
            raise ValueError(f"box is {self}: low must be below high")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and all(
            torch.equal(torch.as_tensor(a).double(), torch.as_tensor(b).double())
            for a, b in ((self.low, other.low), (self.high, other.high))
        )

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def width(self) -> Bound:
        return self.high - self.low

    @property
    def span(self) -> tuple[float, float] | None:
        """Return the lowest and the highest value; ``None`` where features have bounds of their own."""
        low, high = self.low, self.high
        return None if isinstance(low, Tensor) or isinstance(high, Tensor) else (float(low), float(high))

    @property
    def magnitude(self) -> float:
        """Return the largest absolute value in the box, or 1: a rounding error is as large as a part of it."""
        return max(1.0, *(torch.as_tensor(bound).abs().max().item() for bound in (self.low, self.high)))

    def diameter(self, norm: str, image: Tensor) -> float:
        """Return the size of the largest perturbation that the box has room for, of an ``image`` (...)."""
        width = torch.as_tensor(self.width, dtype=torch.double).cpu().expand(image.shape)
        return NORMS[norm].size(width.unsqueeze(0)).item()

    def inside(self, x: Tensor) -> Tensor:
        """Return ``x`` itself where it is in the box already, else as `clamp`."""
        within = all(bool((self.excess(x[part]) <= 0).all()) for part in in_parts(x))
        return x if within else self.clamp(x)

    def clamp(self, x: Tensor) -> Tensor:
        """Return ``x`` with what lies outside put on the edge."""
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            return x.maximum(torch.as_tensor(self.low).to(x)).minimum(torch.as_tensor(self.high).to(x))
        return x.clamp(self.low, self.high)

    def excess(self, x: Tensor) -> Tensor:
        """Return by how much each sample (N, ...) leaves the box, (N,); not above 0 where it does not."""
        low, high = (bound.to(x) if isinstance(bound, Tensor) else bound for bound in (self.low, self.high))
        return torch.maximum(low - x, x - high).flatten(1).amax(1)

    def levels(self, x: Tensor) -> Tensor:
        """Return ``x`` in float64 as shares of the box's width, in [0, 1]; a feature that has no room is at 0."""
        low, width = (bound.to(x.device) if isinstance(bound, Tensor) else bound for bound in (self.low, self.width))
        return ((x.double() - low) / width).nan_to_num(nan=0.0)

    def __str__(self) -> str:
        low, high = (bound.min().item() if isinstance(bound, Tensor) else bound for bound in (self.low, self.high))
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            high = torch.as_tensor(self.high).max().item()
            return f"[{low:g}, {high:g}], feature by feature,"
        return f"[{low:g}, {high:g}]"


UNIT = Box()
