"""Define what an attack is after, and what it maximises to get there: one value per sample.

Shape suffixes: M members, N samples, K classes. ``scores_NK`` are a model's outputs, ``logits_MNK`` its members'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ensemble_attacks.models.view import Outputs
from ensemble_attacks.scores import at_least, best_other, gather, margin, mask_class


@dataclass(frozen=True, eq=False)
class Goal:
    """A goal that says, sample by sample, what counts as success, and what a descent is after.

    Attributes:
        leave: the classes to leave, (N,).
        reach: the classes that descents aim at, (N,); ``None``: any other than ``leave``.
        only: whether nothing but the prediction of ``reach`` is a success (a targeted attack).
        direction: a direction in the space of scores to go along instead, (N, K).
        ranked: the classes in the order in which an attack ranks them as targets, (N, K), the label last; ``None``: by the
            scores of the clean image.
    """

    leave: Tensor
    reach: Tensor | None = None
    only: bool = False
    direction: Tensor | None = None
    ranked: Tensor | None = None

    def margin(self, scores: Tensor) -> Tensor:
        """Return the margin of ``scores`` (..., N, K), shaped (..., N), which is negative where they are a success."""
        if self.only:
            assert self.reach is not None
            return -margin(scores, self.reach)
        return margin(scores, self.leave)

    def overtaken(self, scores_NK: Tensor) -> Tensor:
        """Return the classes whose scores stand in the way, (N,): those to leave, or in a targeted attack the best other."""
        if self.only:
            assert self.reach is not None
            return best_other(scores_NK.detach(), self.reach)
        return self.leave

    def towards(self, classes: Tensor) -> Goal:
        """Return a goal with the same success that is reached by way of these classes (N,)."""
        return replace(self, reach=classes)

    def along(self, direction: Tensor) -> Goal:
        """Return a goal with the same success that is reached by way of a direction (N, K)."""
        return replace(self, direction=direction)

    def settled(self, clean_NK: Tensor) -> Goal:
        """Return a goal that leaves the best other class where a caller named the same class to leave and to reach."""
        if not self.only:
            return self
        assert self.reach is not None
        return replace(self, leave=torch.where(self.leave == self.reach, best_other(clean_NK, self.reach), self.leave))

    def select(self, rows: Tensor | slice) -> Goal:
        """Return the goal of some of the samples."""
        reach, direction, ranked = (None if t is None else t[rows] for t in (self.reach, self.direction, self.ranked))
        return replace(self, leave=self.leave[rows], reach=reach, direction=direction, ranked=ranked)

    def tile(self, copies: int) -> Goal:
        """Return the goal of ``copies`` of all samples, one copy after another."""
        if copies == 1:
            return self
        reach = None if self.reach is None else self.reach.repeat(copies)
        direction = None if self.direction is None else self.direction.repeat(copies, 1)
        return replace(self, leave=self.leave.repeat(copies), reach=reach, direction=direction)


Objective = Callable[[Outputs, Goal], Tensor]  # -> loss (N,), to be maximised


def ce(scores_NK: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy, (N,), in nats."""
    return F.cross_entropy(scores_NK, labels, reduction="none")


def cross_entropy(scores_NK: Tensor, goal: Goal) -> Tensor:
    """Return ``CE(z, y)``, or ``-CE(z, t)`` towards a class t, (N,), in nats."""
    return ce(scores_NK, goal.leave) if goal.reach is None else -ce(scores_NK, goal.reach)


def lead(scores_NK: Tensor, goal: Goal) -> Tensor:
    """Return by how much the best other class, or the one aimed at, leads the class to leave, (N,).

    It is ``max_{j != y} z_j - z_y``, or ``z_t - z_y`` towards a class t.
    """
    leave = goal.overtaken(scores_NK)
    if goal.reach is None:
        return -margin(scores_NK, leave)
    return gather(scores_NK, goal.reach) - gather(scores_NK, leave)


def dlr(scores_NK: Tensor, labels: Tensor) -> Tensor:
    """Return the difference of logits ratio, (N,) (Croce & Hein 2020, "Reliable evaluation ...", eq. 6); it needs K >= 3."""
    ranked_NK = scores_NK.sort(-1, descending=True).values
    return -margin(scores_NK, labels) / (ranked_NK[:, 0] - ranked_NK[:, 2] + 1e-12)


def dlr_targeted(scores_NK: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the targeted DLR, (N,) (Croce & Hein 2020, eq. 7); it needs K >= 4."""
    ranked_NK = scores_NK.sort(-1, descending=True).values
    spread_N = ranked_NK[:, 0] - (ranked_NK[:, 2] + ranked_NK[:, 3]) / 2 + 1e-12
    return -(gather(scores_NK, labels) - gather(scores_NK, targets)) / spread_N


def ratio(scores_NK: Tensor, goal: Goal) -> Tensor:
    """Return `dlr`, or `dlr_targeted` towards a class, (N,)."""
    if goal.reach is None:
        return dlr(scores_NK, goal.leave)
    return dlr_targeted(scores_NK, goal.overtaken(scores_NK), goal.reach)


def of_scores(loss: Callable[[Tensor, Goal], Tensor]) -> Objective:
    """Return the objective that is a loss of the model's own scores."""
    return lambda outputs, goal: loss(outputs.scores_NK, goal)


def log_expected(outputs: Outputs, goal: Goal) -> Tensor:
    """Return the loss ``-log E[p_y]`` of the expected probability, or ``log E[p_t]`` towards a class t, (N,), in nats.

    Of a model whose expectation is not known, it is each draw's ``1 - p_y``, or ``p_t``, whose mean over draws orders images
    as that logarithm does, and has its gradient's direction. ``1 - p_y`` is the sum of the others, never a difference.
    """
    if outputs.weights_E is not None:
        return cross_entropy(outputs.scores_NK, goal)
    log_p_NK = outputs.scores_NK.log_softmax(-1)
    if goal.reach is not None:
        return gather(log_p_NK, goal.reach).exp()
    return mask_class(log_p_NK, goal.leave).exp().sum(-1)


def expected(objective: Objective) -> Objective:
    """Return the objective that is the mean of another over the members that a model draws from."""

    def mean(outputs: Outputs, goal: Goal) -> Tensor:
        assert outputs.logits_MNK is not None
        assert outputs.weights_E is not None
        losses = [objective(Outputs(logits_NK), goal) for logits_NK in outputs.logits_MNK]
        return torch.einsum("m,mn->n", outputs.weights_E.to(losses[0]), torch.stack(losses))

    return mean


def normalize_margin(scores_NK: Tensor, labels: Tensor, others: Tensor | None = None) -> Tensor:
    """Return scores divided by their detached margin (MORA, eq. 12), so that softmax of them neither saturates nor vanishes.

    The margin is of y over the best other class, or over ``others``.
    """
    detached = scores_NK.detach()
    lead_N = margin(detached, labels) if others is None else gather(detached, labels) - gather(detached, others)
    return scores_NK / at_least(lead_N.abs(), detached).unsqueeze(-1)
