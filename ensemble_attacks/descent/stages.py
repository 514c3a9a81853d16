"""Describe what an attack runs, one descent after another, and record how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ensemble_attacks.descent.look import Point
from ensemble_attacks.descent.objectives import Objective
from ensemble_attacks.descent.steps import StepRule
from ensemble_attacks.devices import numbers

NEVER = 2**31 - 1  # the stage in which a sample that held out was fooled
FEWEST = 100  # samples that a stage takes, if there are as many, however small its share
CLOSEST = 0  # target rank of the class that has come closest so far
Direction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (noise, labels, ranked classes) -> direction (N, K)


@dataclass(frozen=True)
class Stage:
    """A stage of an attack, which is one descent from one start.

    Attributes:
        objective: what to maximise.
        target_rank: aim at the wrong class of this rank, 1 the likeliest, by the scores of the clean image; `CLOSEST`: at
            the one whose score has come closest to the label's in all iterates so far, among those that the fewest stages of
            as many steps or more have aimed at; ``None``: at none.
        restart: the number of the sample's random start.
        direction: the maker of a random direction in the space of scores, (N, K), along which the objective goes; it is
            given noise (N, K), uniform in [-1, 1], the labels (N,), and the wrong classes (N, K - 1) ranked by the scores of
            the clean image.
        steps, step_rule: the number of gradient steps, and the maker of the step rule; ``None``: the attack's.
        resume: whether to go on where the stage before ended, on the samples that it took and left robust.
        share: the share of the robust samples that the stage takes, those of the smallest margin; `FEWEST` at least.
        opening: whether the descent begins at the clean images, or at the caller's start, whose first look serves it, too;
            only the first stage may be one, and it takes all that are robust.
        uniform: whether a random start lies anywhere in the ball; else it is on the sphere.
    """

    objective: Objective
    target_rank: int | None = None
    restart: int = 0
    direction: Direction | None = None
    steps: int | None = None
    step_rule: Callable[..., StepRule] | None = None
    resume: bool = False
    share: float = 1.0
    opening: bool = False
    uniform: bool = False


@dataclass(eq=False)
class Trace:
    """A record of an attack's convergence, with one row per step of every stage, summed over batches.

    Rows hold ``stage``, ``step``, ``fooled`` (samples first fooled here), ``forwards`` and ``backwards`` (image passes spent
    here), and ``loss`` (mean over the samples of the pass, ``None`` where it was not needed). The row of stage -1 is the
    pass of the clean images, and of a start.

    Attributes:
        fooled_in: for each call of the attack, the stage (N,) in which each sample was fooled: -1 if the clean image, or a
            start, was a success already, `NEVER` if it held out.
    """

    _booked: dict[tuple[int, int], list[tuple[Tensor | float, ...]]] = field(default_factory=dict, repr=False)
    fooled_in: list[Tensor] = field(default_factory=list, repr=False)

    def begin(self, fooled_in: Tensor) -> None:
        """Book a call of an attack, which goes on to fill ``fooled_in`` (N,)."""
        self.fooled_in.append(fooled_in)

    def fooled(self, samples: int) -> Tensor | None:
        """Return which of so many samples the attack saw fooled, (N,) bool; ``None`` where it booked another number."""
        stages = torch.cat([part.cpu() for part in self.fooled_in]) if self.fooled_in else torch.empty(0)
        return stages < NEVER if len(stages) == samples else None

    def look(self, fooled: Tensor, seen: Sequence[Point]) -> None:
        """Book the looks at some samples before their first stage: at the clean images and, if there is one, at a start."""
        forwards = sum(point.forwards for point in seen)
        self.add(-1, 0, fooled, forwards, seen[-1].backwards, seen[-1].loss_N.sum())

    def step(self, stage: int, step: int, fooled: Tensor, point: Point) -> None:
        """Book what was seen of samples (N,) at a step, and which of them are ``fooled`` there for the first time."""
        loss = point.loss_N.sum() * (point.backwards / len(fooled))
        self.add(stage, step, fooled.sum(), point.forwards, point.backwards, loss)

    def add(self, stage: int, step: int, fooled: Tensor | int, forwards: int, backwards: int, loss: Tensor | float) -> None:
        self._booked.setdefault((stage, step), []).append((fooled, forwards, backwards, loss))

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows in the order of the run, each with ``robust``, the number of samples not fooled so far."""
        rows, robust = [], sum(map(len, self.fooled_in))
        all_booked = sorted(self._booked.items())
        columns = zip(*(row for _, booked in all_booked for row in booked), strict=True)
        read = zip(*map(numbers, columns), strict=True)
        for (stage, step), booked in all_booked:
            *counts, loss = map(sum, zip(*islice(read, len(booked)), strict=True))
            fooled, forwards, backwards = map(int, counts)
            robust -= fooled
            mean_loss = loss / backwards if backwards else None
            row = dict(stage=stage, step=step, fooled=fooled, robust=robust, forwards=forwards, backwards=backwards)
            rows.append({**row, "loss": mean_loss})
        return rows
