"""Keep the samples of a descent that are still asked about: their state, and when those that are fooled leave.

How many are robust is known at once where the host can read it. Of a device it is read some steps later, so that nobody
waits; until then, those that are fooled are moved on with the others, and nothing more is booked of them. What a descent
finds is the same in any `Rhythm`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ensemble_attacks.descent.look import Point
from ensemble_attacks.descent.objectives import Goal
from ensemble_attacks.devices import Later, at_hand
from ensemble_attacks.scores import gather, per_sample


@dataclass(frozen=True)
class Rhythm:
    """A rhythm in which samples that are fooled leave.

    Attributes:
        lag: how many steps later it is read how many are robust; 0: at once.
        share: the share of robust samples in the batch below which the others leave; 1: as soon as there is one.
    """

    lag: int
    share: float


AT_ONCE = Rhythm(0, 1.0)
IN_TIME = Rhythm(4, 0.75)  # of a device: a step's passes, told ahead, take longer than a read of what came before them


class Descent(NamedTuple):
    """A record of what a descent found.

    Attributes:
        best_x, best_margin_N: the iterate of the smallest margin (`Point`) of every sample, and that margin.
        last_x: where each sample that was not fooled ended.
        gaps_NK: the gaps of `Start`, brought up to date.
    """

    best_x: Tensor
    best_margin_N: Tensor
    last_x: Tensor
    gaps_NK: Tensor


class Batch:
    """A record of the samples that a descent still asks about, B of N.

    Args:
        x: where all of them begin, (N, ...).
        gaps_NK: the smallest lead of the label's score over each class's so far.
        rhythm: when those that are fooled leave; ``None``: as it suits the device.

    Attributes:
        rows: which they are, (B,).
        robust: which of them no iterate has fooled, (B,) bool.
        best_x, best_margin_N, gaps_NK: what has been found of them (`Descent`), (B, ...).
    """

    def __init__(self, x: Tensor, gaps_NK: Tensor, rhythm: Rhythm | None = None) -> None:
        self.rhythm = rhythm or (AT_ONCE if at_hand(x) else IN_TIME)
        self.rows = torch.arange(len(x), device=x.device)
        self.robust = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.best_x, self.gaps_NK = x, gaps_NK
        self.best_margin_N = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self._left: Descent | None = None  # of all N, once some have left
        self._counts: deque[Later] = deque()
        self._alive = len(x)

    def book(self, x: Tensor, point: Point, goal: Goal) -> Tensor:
        """Take in what was seen at ``x``, and return which samples are fooled there for the first time, (B,) bool."""
        lead_NK = gather(point.scores_NK, goal.leave).unsqueeze(-1) - point.scores_NK
        self.gaps_NK = torch.where(self.robust.unsqueeze(-1), self.gaps_NK.fmin(lead_NK), self.gaps_NK)
        margin_N = point.margin_N.to(self.best_margin_N.dtype)
        improved = self.robust & (margin_N < self.best_margin_N)
        self.best_x = torch.where(per_sample(improved, x), x, self.best_x)
        self.best_margin_N = torch.where(improved, margin_N, self.best_margin_N)
        fooled = self.robust & (margin_N < 0)
        self.robust = self.robust & ~fooled
        return fooled

    def alive(self) -> int:
        """Return how many samples are robust, as far as that is known: there may be fewer."""
        self._counts.append(Later(self.robust.sum()))
        if len(self._counts) > self.rhythm.lag:
            self._alive = int(self._counts.popleft().read())
        return self._alive

    def leave(self) -> Tensor | None:
        """Let those leave that are known to be fooled, if that pays; return which stay, as rows of the batch."""
        if not self._alive < self.rhythm.share * len(self.rows):
            return None
        order = self.robust.logical_not().to(torch.uint8).argsort(stable=True)
        stay = order[: self._alive]
        self._store(order[self._alive :], self.best_x)
        self.rows, self.robust, self.best_x = self.rows[stay], self.robust[stay], self.best_x[stay]
        self.best_margin_N, self.gaps_NK = self.best_margin_N[stay], self.gaps_NK[stay]
        return stay

    def found(self, x: Tensor) -> Descent:
        """Return what was found of all N samples, of which those in the batch end at ``x``."""
        if self._left is None:
            return Descent(self.best_x, self.best_margin_N, x, self.gaps_NK)
        return self._store(slice(None), x)

    def _store(self, leaving: Tensor | slice, x: Tensor) -> Descent:
        state = Descent(self.best_x, self.best_margin_N, x, self.gaps_NK)
        if self._left is None:
            self._left = Descent(*(torch.empty_like(part) for part in state))
        for whole, part in zip(self._left, state, strict=True):
            whole[self.rows[leaving]] = part[leaving]
        return self._left
