"""Choose how much of a model a report looks into, by what a pass of it costs: the same on every machine and at any time.

A pass is taken to cost as many operations as torch counts in the products of one, and `PER_FEATURE` more for every feature
of an input: what a step of an attack does to images of many pixels takes longer than many a network.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ensemble_attacks.evaluation.chains import Context
from ensemble_attacks.models.ask import ask, beside
from ensemble_attacks.models.preserve import private_random_state

logger = logging.getLogger(__name__)
PER_FEATURE = 1000
DIAGNOSIS, OTHER = 2.5e12, 5e11  # operations that the checks, and each figure, may take: at most a minute of one core
LEVELS = ((32, 8), (16, 4), (8, 2), (4, 1))  # images that the checks look at: all together, one by one
TOGETHER, ALONE = 250, 1400  # passes that they take of each of these
TRANSFERRED = 150  # passes of an image in the matrix of transfers, of three members
GRIDS = (15, 9)  # points of the loss surface along each direction


@dataclass(frozen=True)
class Effort:
    """A record of how much is looked into; 0 where it would take too long.

    Attributes:
        diagnosed, alone: images that the checks look at, all together and one by one.
        transferred: images of the matrix of transfers.
        grid: points of the loss surface along each direction.
    """

    diagnosed: int
    alone: int
    transferred: int
    grid: int

    @classmethod
    def of(cls, context: Context) -> Effort:
        """Return the effort for a model, and the images of a run."""
        cost = _operations(context) * (context.settings.eot_iter or 1)
        levels = [(n, one) for n, one in LEVELS if cost * (TOGETHER * n + ALONE * one) <= DIAGNOSIS]
        diagnosed, alone = levels[0] if levels else (0, 0)
        transferred = next((n for n, _ in LEVELS if cost * TRANSFERRED * n <= OTHER), 0)
        grid = next((grid for grid in GRIDS if cost * 2 * grid**2 <= OTHER), 0)
        return cls(diagnosed, alone, transferred, grid)

    @property
    def left_out(self) -> str:
        """Return what is left out; empty where nothing is."""
        parts = (("the checks", self.diagnosed), ("the transfer between members", self.transferred))
        lacking = [name for name, size in (*parts, ("the surface of the margin", self.grid)) if not size]
        return ", ".join(lacking)


@torch.no_grad()
def _operations(context: Context) -> float:
    """Return about how many operations a forward pass of one image takes."""
    features = PER_FEATURE * context.x[0].numel()
    try:
        with private_random_state(context.settings.seed, context.model), FlopCounterMode(display=False) as counter:
            ask(context.model, beside(context.model, context.x[:1]))
    except Exception as error:  # of a model whose passes torch cannot count, such as a compiled one
        logger.info("operations of a pass are not counted: %s", error)
        return float(features)
    return float(counter.get_total_flops() + features)
