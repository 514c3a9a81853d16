"""Keep what is known of every sample while an attack runs: whether it is robust, its best image, the classes aimed at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.descent.balls import Ball, make_ball
from ensemble_attacks.descent.look import Point
from ensemble_attacks.descent.noise import direction_noise, sample_keys, start_noise
from ensemble_attacks.descent.objectives import Goal
from ensemble_attacks.descent.stages import CLOSEST, FEWEST, NEVER, Stage
from ensemble_attacks.norms import Box
from ensemble_attacks.scores import gather, mask_class


class Start(NamedTuple):
    """A record of where a descent of some samples begins.

    Attributes:
        x: the first iterates (N, ...), in the ``ball``.
        ball: the ball around the clean images.
        goal: what these samples' descent is after.
        gaps_NK: the smallest lead of the label's score over each class's so far.
        seen: what has been seen at ``x`` already, if anything.
    """

    x: Tensor
    ball: Ball
    goal: Goal
    gaps_NK: Tensor
    seen: Point | None


class Descent(NamedTuple):
    """A record of what a descent found.

    Attributes:
        best_x, best_margin_N: the iterate of the smallest margin (`Point`) of every sample, and that margin.
        last_x: where each sample ended.
        gaps_NK: the gaps of `Start`, brought up to date.
    """

    best_x: Tensor
    best_margin_N: Tensor
    last_x: Tensor
    gaps_NK: Tensor


class Progress:
    """A record of all samples (N, ...), which is kept up to date from stage to stage.

    Args:
        images: the centres of the balls.
        start: where the opening, or the first restart, begins; ``None``: the opening at the clean images, restarts at
            random.
        goal: what counts as success.
        seen: what was seen of the clean images and, if there is one, of ``start``; the last one with its gradient where
            ``plan`` has an opening.
        plan: all stages.
        norm, eps, box: the ball, and the values that images can take; eps in their units.
        seed: the seed of the random starts and directions.
        steps: the number of gradient steps of stages that do not say their own.

    Attributes:
        adversarial: the first iterate that succeeded; failing that, the one of the smallest margin.
        margin_N: the margin of that image, which is negative where it succeeded.
        fooled_in: the stage in which each sample was fooled: -1 if the clean image, or a start, was a success already,
            `NEVER` if it held out.
    """

    def __init__(
        self,
        images: Tensor,
        start: Tensor | None,
        goal: Goal,
        seen: Sequence[Point],
        plan: Sequence[Stage],
        *,
        norm: str,
        eps: float,
        seed: int,
        steps: int,
        box: Box,
    ) -> None:
        self.images, self.start, self.goal, self.seen_at_start = images, start, goal, seen[-1]
        self.norm, self.eps, self.seed, self.steps, self.box = norm, eps, seed, steps, box
        self.clean_NK = clean_NK = seen[0].scores_NK
        self.ranked_NK = mask_class(clean_NK, goal.leave).argsort(dim=-1, descending=True, stable=True)
        self.adversarial, self.ended = images.clone(), images.clone()
        margin_N = seen[0].margin_N.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # any finite one is less
        if start is not None:
            closer = seen[1].margin_N < margin_N
            self.adversarial[closer], margin_N = start[closer], margin_N.fmin(seen[1].margin_N)
        self.margin_N = margin_N
        self.gaps_NK = gather(clean_NK, goal.leave).unsqueeze(-1) - clean_NK
        never_NK = F.one_hot(goal.leave, clean_NK.shape[1]) * NEVER
        self.aims = {self.steps_of(stage): never_NK.clone() for stage in plan}  # at each class, by as many steps or more
        self.fooled_in = torch.full_like(goal.leave, NEVER).masked_fill(margin_N < 0, -1)
        self.keys = sample_keys(images, box)
        self.chosen = torch.arange(0)

    def steps_of(self, stage: Stage) -> int:
        return stage.steps or self.steps

    @property
    def robust(self) -> Tensor:
        """Return the samples that no image has fooled so far, (N,) bool."""
        return ~(self.margin_N < 0)

    def rows(self, stage: Stage) -> Tensor:
        """Return the samples that a stage takes: of the robust ones, those of the smallest margin first."""
        robust = self.robust
        if stage.resume:
            self.chosen = self.chosen[robust[self.chosen]]
        else:
            chosen = torch.nonzero(robust).squeeze(-1)
            chosen = chosen[self.margin_N[chosen].argsort(stable=True)]
            self.chosen = chosen[: max(math.ceil(stage.share * len(chosen)), FEWEST)]
        return self.chosen

    def begin(self, stage: Stage, rows: Tensor) -> Start:
        """Return where the stage's descent of some samples begins, and what it is after."""
        ball = make_ball(self.norm, self.images[rows], self.eps, self.box)
        keys = [self.keys[row] for row in rows.tolist()]
        if stage.resume:
            x = self.ended[rows]
        elif stage.opening:
            x = (self.images if self.start is None else self.start)[rows]
        elif self.start is not None and stage.restart == 0:
            x = ball.project(self.start[rows])
        else:
            x = ball.start(start_noise(keys, self.images[rows], seed=self.seed, restart=stage.restart, norm=self.norm))
        goal = self._aimed(stage, rows, self.goal.select(rows), keys)
        return Start(x, ball, goal, self.gaps_NK[rows], self.seen_at_start.at(rows) if stage.opening else None)

    def _aimed(self, stage: Stage, rows: Tensor, goal: Goal, keys: list[bytes]) -> Goal:
        if stage.direction is not None:
            noise_NK = direction_noise(keys, self.clean_NK[rows], seed=self.seed, restart=stage.restart)
            return goal.along(stage.direction(noise_NK, goal.leave, self.ranked_NK[rows, :-1]))
        if stage.target_rank is None:
            return goal
        steps = self.steps_of(stage)
        if stage.target_rank == CLOSEST:
            targets = closest_class(self.gaps_NK[rows], self.aims[steps][rows])
        else:
            targets = self.ranked_NK[rows, stage.target_rank - 1]
        for length, aims_NK in self.aims.items():
            aims_NK[rows, targets] += int(length <= steps)
        return goal.towards(targets)

    def book(self, index: int, rows: Tensor, found: Descent) -> None:
        """Take in what the descent of the stage ``index`` found."""
        self.gaps_NK[rows], self.ended[rows] = found.gaps_NK, found.last_x
        better = found.best_margin_N < self.margin_N[rows]
        self.adversarial[rows[better]] = found.best_x[better]
        self.margin_N[rows[better]] = found.best_margin_N[better].to(self.margin_N.dtype)
        self.fooled_in[rows[found.best_margin_N < 0]] = index


def closest_class(gaps_NK: Tensor, aims_NK: Tensor) -> Tensor:
    """Return the class of the smallest gap among those that were aimed at the fewest times, (N,)."""
    finite_NK = gaps_NK.nan_to_num(nan=torch.finfo(gaps_NK.dtype).max)
    return finite_NK.masked_fill(aims_NK > aims_NK.amin(1, keepdim=True), torch.inf).argmin(1)
