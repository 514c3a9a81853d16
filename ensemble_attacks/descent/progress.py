"""Keep what is known of every sample while an attack runs: whether it is robust, its best image, the classes aimed at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.descent.balls import Ball, make_ball
from ensemble_attacks.descent.batch import Descent
from ensemble_attacks.descent.look import Point
from ensemble_attacks.descent.noise import direction_noise, sample_keys, start_noise
from ensemble_attacks.descent.objectives import Goal
from ensemble_attacks.descent.stages import CLOSEST, FEWEST, NEVER, Stage
from ensemble_attacks.devices import placed
from ensemble_attacks.norms import Box
from ensemble_attacks.scores import gather, mask_class, per_sample

Rows = Tensor | slice


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


class Progress:
    """A record of all samples (N, ...), which is kept up to date from stage to stage.

    Args:
        images: the centres of the balls.
        start: where the opening, or the first restart, begins, which is put into the ball; ``None``: the opening at the
            clean images, restarts at random.
        goal: what counts as success.
        plan: all stages.
        norm, eps, box, scale: the ball (`Ball`), and the values that images can take; eps in their units.
        seed: the seed of the random starts and directions.
        steps: the number of gradient steps of stages that do not say their own.

    Attributes:
        adversarial: the first iterate that succeeded; failing that, the one of the smallest margin.
        margin_N: the margin of that image, which is negative where it succeeded; known of what was seen (`see`).
        fooled_in: the stage in which each sample was fooled: -1 if the clean image, or a start, was a success already,
            `NEVER` if it held out.

    Of what is as large as the images, it holds those it returns and, where a stage resumes, where the last one ended.
    """

    margin_N: Tensor
    clean_NK: Tensor
    ranked_NK: Tensor
    gaps_NK: Tensor

    def __init__(
        self,
        images: Tensor,
        start: Tensor | None,
        goal: Goal,
        plan: Sequence[Stage],
        *,
        norm: str,
        eps: float,
        seed: int,
        steps: int,
        box: Box,
        scale: Tensor | None = None,
    ) -> None:
        self.images, self.start, self.goal = images, start, replace(goal, leave=goal.leave.clone())
        self.norm, self.eps, self.seed, self.steps, self.box, self.scale = norm, eps, seed, steps, box, scale
        self.adversarial = images.clone()
        self.ended = images.clone() if any(stage.resume for stage in plan) else None
        self.aims: dict[int, Tensor] = {self.steps_of(stage): torch.empty(0) for stage in plan}
        self.fooled_in = torch.full_like(goal.leave, NEVER)
        self.keys = sample_keys(images, box)
        self.chosen = torch.arange(0, device="cpu")

    def _make_room(self, seen: Point) -> None:
        """Make room for what is to be known of all samples: their number of classes shows in the first scores."""
        scores_NK = seen.scores_NK.new_empty(len(self.images), seen.scores_NK.shape[1])
        self.margin_N = seen.margin_N.new_empty(len(self.images))
        self.clean_NK, self.gaps_NK = scores_NK, scores_NK.clone()
        self.ranked_NK = torch.empty_like(scores_NK, dtype=torch.long)
        # how often each sample was aimed at each class, by as many steps or more
        self.aims = {steps: torch.empty_like(self.ranked_NK) for steps in self.aims}

    def ball(self, rows: Rows) -> Ball:
        """Return the ball around some of the images."""
        scale = self.scale
        if scale is not None and scale.shape == self.images.shape:
            scale = scale[rows if isinstance(rows, slice) else rows.to(scale.device)]
        return make_ball(self.norm, self.images[rows], self.eps, self.box, scale)

    def opening(self, rows: Rows) -> Tensor:
        """Return where some samples are looked at first: at the caller's start, or at the clean images."""
        return self.images[rows] if self.start is None else self.ball(rows).project(self.start[rows])

    def see(self, rows: slice, seen: Sequence[Point]) -> None:
        """Take in what was seen of some samples: of the clean images and, if there is one, of the start."""
        clean_NK = seen[0].scores_NK
        if not hasattr(self, "margin_N"):
            self._make_room(seen[0])
        goal = self.goal.select(rows).settled(clean_NK)
        self.goal.leave[rows] = leave = goal.leave
        margin_N = seen[0].margin_N.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # any finite one is less
        if len(seen) > 1:
            closer = seen[1].margin_N < margin_N
            opening = self.opening(rows)
            self.adversarial[rows] = torch.where(per_sample(closer, opening), opening, self.adversarial[rows])
            margin_N = margin_N.fmin(seen[1].margin_N)
        self.margin_N[rows], self.clean_NK[rows] = margin_N, clean_NK
        ranked_NK = mask_class(clean_NK, leave).argsort(dim=-1, descending=True, stable=True)
        self.ranked_NK[rows] = ranked_NK if goal.ranked is None else goal.ranked
        self.gaps_NK[rows] = gather(clean_NK, leave).unsqueeze(-1) - clean_NK
        for aims_NK in self.aims.values():
            aims_NK[rows] = F.one_hot(leave, clean_NK.shape[1]) * NEVER
        self.fooled_in[rows] = torch.where(margin_N < 0, -1, NEVER)

    def steps_of(self, stage: Stage) -> int:
        return stage.steps or self.steps

    def rows(self, stage: Stage, among: slice = slice(None)) -> Tensor:
        """Return the samples that a stage takes: of the robust ones (``among`` these), those of the smallest margin first.

        An opening takes those of one batch after another, while what was seen of it is at hand. They are chosen on the host,
        which waits once for their margins.
        """
        margin_N = self.margin_N[among].cpu()
        rows = torch.arange(len(self.images), device="cpu")
        if stage.resume:
            self.chosen = self.chosen[~(margin_N[self.chosen] < 0)]
            return self.chosen
        robust = torch.nonzero(~(margin_N < 0)).squeeze(-1)
        chosen = rows[among][robust[margin_N[robust].argsort(stable=True)]]
        chosen = chosen[: max(math.ceil(stage.share * len(chosen)), FEWEST)]
        self.chosen = torch.cat([self.chosen, chosen]) if stage.opening else chosen
        return chosen

    def begin(self, stage: Stage, chosen: Tensor, seen: Point | None = None) -> Start:
        """Return where the stage's descent of chosen `rows` begins, what was ``seen`` there, and what it is after."""
        keys, rows = [self.keys[row] for row in chosen.tolist()], placed(chosen, self.images.device)
        ball = self.ball(rows)
        if stage.resume:
            assert self.ended is not None
            x = self.ended[rows]
        elif stage.opening or (self.start is not None and stage.restart == 0):
            x = self.opening(rows)
        else:
            noise = start_noise(keys, self.images[rows], seed=self.seed, restart=stage.restart, norm=self.norm)
            x = ball.uniform(noise) if stage.uniform else ball.start(noise)
        return Start(x, ball, self._aimed(stage, rows, self.goal.select(rows), keys), self.gaps_NK[rows], seen)

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

    def book(self, index: int, chosen: Tensor, found: Descent) -> None:
        """Take in what the descent of the stage ``index`` found of chosen `rows`."""
        rows = placed(chosen, self.images.device)
        self.gaps_NK[rows] = found.gaps_NK
        if self.ended is not None:
            self.ended[rows] = found.last_x
        margin_N, best_x = self.margin_N[rows], found.best_x
        better = found.best_margin_N < margin_N
        self.adversarial[rows] = torch.where(per_sample(better, best_x), best_x, self.adversarial[rows])
        self.margin_N[rows] = torch.where(better, found.best_margin_N.to(margin_N.dtype), margin_N)
        self.fooled_in[rows] = torch.where(found.best_margin_N < 0, index, self.fooled_in[rows])


def closest_class(gaps_NK: Tensor, aims_NK: Tensor) -> Tensor:
    """Return the class of the smallest gap among those that were aimed at the fewest times, (N,)."""
    finite_NK = gaps_NK.nan_to_num(nan=torch.finfo(gaps_NK.dtype).max)
    return finite_NK.masked_fill(aims_NK > aims_NK.amin(1, keepdim=True), torch.inf).argmin(1)
