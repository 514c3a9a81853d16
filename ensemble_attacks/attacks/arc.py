"""Implement ARC, Attacking Randomized ensembles of Classifiers (Dbouk & Shanbhag, "Adversarial Vulnerability of Randomized
Ensembles", ICML 2022, algorithm 1), in the loop of every attack here.

Expectation-over-members gradients mix members that a perturbation cannot fool all at once. ARC takes the members one after
another, the likeliest first, steps just across the boundary of each, and keeps a step only if the expected accuracy does not
rise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.descent.balls import Ball
from ensemble_attacks.descent.look import TIE
from ensemble_attacks.descent.objectives import Goal
from ensemble_attacks.descent.stages import Stage
from ensemble_attacks.descent.steps import StepRule
from ensemble_attacks.errors import NotAnEnsembleError
from ensemble_attacks.models.ensembles import member_probabilities
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.norms import NORMS, UNIT, Box, Norm
from ensemble_attacks.scores import best_other, gather, per_sample
from ensemble_attacks.validation import check_count, check_positive


@dataclass
class Turn:
    """A counter that says whose turn it is.

    Every member's gradient is taken where the round began, and its step then looked at.
    """

    order: Sequence[int]
    step: int = 0

    @property
    def member(self) -> int:
        return self.order[self.step // 2 % len(self.order)]


class MemberSteps(StepRule):
    """A rule that takes ARC's local and global steps (algorithm 1).

    Iterates alternate between the point b of the round, for the gradient of one member, and ``b + local``, for the verdict
    on its step.
    """

    def __init__(self, x: Tensor, *, eps: float, steps: int, turn: Turn, norm: Norm, beyond: float) -> None:
        super().__init__(x, eps=eps, steps=steps)
        self.turn, self.norm, self.beyond = turn, norm, beyond
        turn.step = 0

    def move(
        self, step: int, ball: Ball, previous: Tensor, x: Tensor, gradient: Tensor, loss: Tensor, margin: Tensor
    ) -> tuple[Tensor, Tensor]:
        place = step % (2 * len(self.turn.order))
        self.turn.step = step + 1
        if place == 0:
            self.base, self.local, self.accepted = x, torch.zeros_like(x), margin
        if place % 2 == 0:
            self.proposed = self._propose(ball, gradient, loss)
            return x, ball.project(self.base + self.proposed)
        better = margin < self.accepted + TIE  # the probability of being right does not rise
        self.local = torch.where(per_sample(better, x), self.proposed, self.local)
        self.accepted = torch.where(better, margin, self.accepted)
        round_over = place == 2 * len(self.turn.order) - 1
        return x, ball.project(self.base + self.local) if round_over else self.base

    def _propose(self, ball: Ball, gradient: Tensor, lead: Tensor) -> Tensor:
        """Return the local step with a member's added, which crosses its boundary, as linearised; it has the length eps."""
        slope = self.norm.dual_size(ball.scaled(gradient)).clamp_min(1e-12)
        distance = (-lead).clamp_min(0) / slope
        gone = (gradient * self.local).flatten(1).sum(1) / slope
        near = self.eps / (self.eps - distance).clamp_min(1e-12) * (distance - gone).abs() + self.beyond * self.eps
        first = self.local.flatten(1).abs().amax(1) == 0
        length = torch.where((distance < self.eps) & ~first, near, self.eps)
        step = self.local + per_sample(length, gradient) * ball.steepest(gradient)
        return step * per_sample(self.eps / self.norm.size(step).clamp_min(1e-12), step)


def member_lead(turn: Turn, outputs: Outputs, goal: Goal) -> Tensor:
    """Return by how much another class leads the label's logit in the member whose turn it is, (N,).

    That class is the best other one by logits, or the one aimed at.
    """
    assert outputs.logits_MNK is not None
    logits_NK, leave = outputs.logits_MNK[turn.member], goal.overtaken(outputs.scores_NK)
    others = best_other(logits_NK.detach(), leave) if goal.reach is None else goal.reach
    return gather(logits_NK, others) - gather(logits_NK, leave)


def check_probabilities(model: nn.Module) -> None:
    """Raise `NotAnEnsembleError` unless ``model`` says with which probability it draws each member."""
    if member_probabilities(model) is None:
        raise NotAnEnsembleError(
            f"ARC needs the probabilities with which members are drawn, and {type(model).__name__} has no tensor called "
            "probabilities, (M,): attack it with MORA or EOTAPGD"
        )


class ARC(DescentAttack):
    r"""An attack with ARC on an ensemble whose members are drawn with known probabilities, in the norms Linf and L2.

    The source is Dbouk & Shanbhag, ICML 2022, algorithm 1. Of every member only the class with the nearest logit is looked
    at (G = 1, as in the authors' later BARRE, ICML 2023).

    Arguments:
        model (nn.Module): a randomized ensemble: ``member_logits(x) -> (M, N, K)``, ``aggregate``, ``probabilities`` (M,).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): rounds over all members. (Default: 20)
        n_restarts (int): number of restarts; the first starts at the clean image, the others at random. (Default: 1)
        seed (int): seed of the random starts. (Default: 0)
        beyond (float): how far to go beyond a boundary, in units of eps. (Default: 0.05)
        batch_size (int): samples per pass. (Default: None: all at once)
        box (Box): the values that images can take. (Default: [0, 1])
        mask (Tensor): what may move, bool, of one image or of each. (Default: None: all)

    Raises:
        NotAnEnsembleError: Where the model shows no members, or no probabilities of theirs.

    Shape:
        - images: :math:`(N, ...)`, such as :math:`(N, C, H, W)`, floating point in the box
        - labels: :math:`(N)`, integer class indices
        - output: as images
    """

    needs_members = True

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 20,
        n_restarts: int = 1,
        seed: int = 0,
        *,
        beyond: float = 0.05,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__("ARC", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size, box=box, mask=mask)
        self.n_restarts, self.beyond = n_restarts, beyond
        self._check()

    def _check(self) -> None:
        super()._check()
        check_count("n_restarts", self.n_restarts)
        check_positive("beyond", self.beyond)

    def set_model(self, model: nn.Module) -> None:
        super().set_model(model)
        check_probabilities(model)

    def _stages(self, num_classes: int) -> list[Stage]:
        return [self._restart(restart) for restart in range(self.n_restarts)]

    def _restart(self, restart: int) -> Stage:
        probabilities = member_probabilities(self.model)
        assert probabilities is not None
        turn = Turn(probabilities.argsort(descending=True, stable=True).tolist())
        rule = partial(MemberSteps, turn=turn, norm=NORMS[self.norm], beyond=self.beyond)
        steps = 2 * len(turn.order) * self.steps
        return Stage(partial(member_lead, turn), restart=restart, steps=steps, step_rule=rule, opening=not restart)
