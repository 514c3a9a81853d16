"""Read the curve of robust accuracy against the radius from the images of searches for the smallest one (`MinimalNorm`).

An image is robust at a radius where no image nearer than that fools the model, as far as the search found one: the curve is
an upper bound, as every attack's accuracy is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ensemble_attacks.attacks.registry import MINIMAL
from ensemble_attacks.data import load_dataset
from ensemble_attacks.evaluation.ledger import Ledger
from ensemble_attacks.evaluation.origins import images_of
from ensemble_attacks.evaluation.units import Cell, Unit, by_cell
from ensemble_attacks.judge import distances, wilson_interval

ALL = "all of them"  # the name of the curve of the nearest image that any search found
SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)  # of robust images, at which a curve is told in few words


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve of robust accuracy against the radius.

    Attributes:
        attack: the name of the search.
        distance_N: how far the nearest image is that fools the model, (N,): 0 where the clean one does, infinite where none
            was found.
    """

    attack: str
    distance_N: Tensor

    def robust(self, radius: float) -> tuple[float, float, float]:
        """Return the robust accuracy at a radius, in [0, 1], and its Wilson 95% interval."""
        n = len(self.distance_N)
        left = int((self.distance_N > radius).sum())
        return left / n, *wilson_interval(left, n)

    def radius(self, share: float) -> float:
        """Return the smallest radius at which no larger share of the images is robust; infinite where none was found."""
        n = len(self.distance_N)
        fallen = n - int(share * n + 1e-9)
        return 0.0 if fallen <= 0 else float(self.distance_N.sort().values[fallen - 1])

    def points(self) -> list[tuple[float, float, float, float]]:
        """Return (radius, robust, low, high) at 0 and wherever the curve falls."""
        radii = [0.0, *self.distance_N[self.distance_N.isfinite()].unique().tolist()]
        return [(radius, *self.robust(radius)) for radius in dict.fromkeys(radii)]


def curves_of(ledger: Ledger) -> Iterator[tuple[Cell, list[Curve], int]]:
    """Yield each cell that has searches, their curves, and the number of classes among its labels.

    With ``cascade``, a search's curve is of all up to it. Where there are several, `ALL` is the last.
    """
    for cell, chains in by_cell(ledger.manifest):
        names = [unit.attack for unit in chains[0] if unit.attack.startswith(MINIMAL)]
        if not names:
            continue
        curves: list[Curve] = []
        nearest_N = torch.full((cell.n,), torch.inf, dtype=torch.double)
        labels = torch.cat([_result(ledger, units[0])["labels"] for units in chains])
        for units in zip(*chains, strict=True):
            if (name := units[0].attack) in names:
                own_N = torch.cat([_distances(ledger, unit) for unit in units])
                nearest_N = nearest_N.minimum(own_N)
                curves.append(Curve(name.removeprefix(MINIMAL), nearest_N if cell.cascade else own_N))
        if len(names) > 1:
            curves.append(Curve(ALL, nearest_N))
        yield cell, curves, len(labels.unique())


def _result(ledger: Ledger, unit: Unit) -> dict[str, Tensor]:
    result = ledger.read(unit)
    assert result is not None
    return result.tensors


def _distances(ledger: Ledger, unit: Unit) -> Tensor:
    """Return how far the image is that fools the model, for all images of a range, (N,)."""
    start, stop = unit.range
    clean, _ = load_dataset(**images_of(ledger.manifest), first=start, n=stop - start)
    found = _result(ledger, unit)
    distance_N = torch.full((stop - start,), torch.inf, dtype=torch.double)
    own_N = distances(clean[found["rows"]], found["x_adv"], unit.cell.norm)
    distance_N[found["rows"]] = torch.where(found["robust"].bool(), torch.inf, own_N)
    return distance_N
