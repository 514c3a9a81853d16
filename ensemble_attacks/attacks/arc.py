"""Implement ARC, Attacking Randomized ensembles of Classifiers (Dbouk & Shanbhag, "Adversarial Vulnerability of Randomized
Ensembles", ICML 2022, algorithm 1), in the loop of every attack here.

Expectation-over-members gradients mix members that a perturbation cannot fool all at once. ARC takes the members one after
another, the likeliest first, steps just across the nearest boundary of each, and keeps a step only if the expected accuracy
does not rise.
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
from ensemble_attacks.models.ask import member_probabilities
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.norms import NORMS, UNIT, Box, Norm
from ensemble_attacks.scores import gather, mask_class, per_sample
from ensemble_attacks.validation import check_count, check_positive


@dataclass
class Turn:
    """A counter that says whose turn it is, and which of its boundaries is looked at.

    Of every member, its boundaries with so many ``planes`` other classes are looked at one by one, then its step.
    """

    order: Sequence[int]
    planes: int
    step: int = 0

    @property
    def looks(self) -> int:
        return self.planes + 1

    @property
    def round(self) -> int:
        return self.looks * len(self.order)

    @property
    def member(self) -> int:
        return self.order[self.step % self.round // self.looks]

    @property
    def plane(self) -> int:
        return min(self.step % self.looks, self.planes - 1)


class MemberSteps(StepRule):
    """A rule that takes ARC's local and global steps (algorithm 1).

    With d the point of the round and u the local step so far, every member's boundaries are looked at from ``d + u``, and
    then the point that its step leads to, for the verdict on it.
    """

    def __init__(
        self, x: Tensor, *, eps: float, steps: int, turn: Turn, norm: Norm, beyond: float, consistent: bool
    ) -> None:
        super().__init__(x, eps=eps, steps=steps)
        self.turn, self.norm, self.beyond, self.consistent = turn, norm, beyond, consistent
        turn.step = 0
        self.proposed = x

    def move(
        self, step: int, ball: Ball, previous: Tensor, x: Tensor, gradient: Tensor, loss: Tensor, margin: Tensor
    ) -> tuple[Tensor, Tensor]:
        self.turn.step = step
        if step == 0:  # nobody had said whose turn it was when these images were first seen, in an opening
            return x, x
        step -= 1
        look = step % self.turn.looks
        self.turn.step = step + 1
        if step % self.turn.round == 0:
            self.base, self.local, self.accepted = x, torch.zeros_like(x), margin
        if look == self.turn.planes:
            better = margin < self.accepted + TIE  # the probability of being right does not rise
            self.local = torch.where(per_sample(better, x), self.proposed, self.local)
            self.accepted = torch.where(better, margin, self.accepted)
            return x, ball.project(self.base + self.local)
        self._see(ball, gradient, loss, first=look == 0)
        if look < self.turn.planes - 1:
            return x, x
        self.proposed = self._propose(ball)
        return x, ball.project(self.base + self.proposed)

    def _see(self, ball: Ball, gradient: Tensor, lead: Tensor, *, first: bool) -> None:
        """Keep the boundary, as linearised, that is nearest: ``zeta = min_j (z_y - z_j) / |grad (z_y - z_j)|_q``."""
        slope = self.norm.dual_size(ball.scaled(gradient)).clamp_min(1e-12)
        distance = (-lead).clamp_min(0) / slope
        if first:
            self.distance, self.slope, self.gradient = distance, slope, gradient
            return
        nearer = distance < self.distance
        self.distance = torch.where(nearer, distance, self.distance)
        self.slope = torch.where(nearer, slope, self.slope)
        self.gradient = torch.where(per_sample(nearer, gradient), gradient, self.gradient)

    def _propose(self, ball: Ball) -> Tensor:
        """Return the local step with a member's added, which crosses its nearest boundary; it has the length eps.

        The authors take the distance zeta from ``d + u`` for the one from d, which is ``zeta + <g, u>``.
        """
        gone = (self.gradient * self.local).flatten(1).sum(1) / self.slope  # <g, u>
        from_base = self.distance + gone if self.consistent else self.distance
        ahead = (from_base - gone).abs()
        near = self.eps / (self.eps - from_base).clamp_min(1e-12) * ahead + self.beyond * self.eps
        first = self.local.flatten(1).abs().amax(1) == 0
        length = torch.where((from_base < self.eps) & ~first, near, self.eps)
        step = self.local + per_sample(length, self.gradient) * ball.steepest(self.gradient)
        return step * per_sample(self.eps / self.norm.size(step).clamp_min(1e-12), step)


def member_lead(turn: Turn, outputs: Outputs, goal: Goal) -> Tensor:
    """Return by how much another class leads the label's logit in the member whose turn it is, (N,).

    That class is the one whose plane it is, the best other class by logits being the first, or the one aimed at.
    """
    assert outputs.logits_MNK is not None
    logits_NK, leave = outputs.logits_MNK[turn.member], goal.overtaken(outputs.scores_NK)
    others = goal.reach
    if others is None:
        others = mask_class(logits_NK.detach(), leave).argsort(stable=True, dim=-1, descending=True)[:, turn.plane]
    return gather(logits_NK, others) - gather(logits_NK, leave)


def likeliest_first(model: nn.Module) -> list[int]:
    """Return the members of a randomized ensemble in the order in which they are taken."""
    probabilities = member_probabilities(model)
    assert probabilities is not None
    return probabilities.argsort(descending=True, stable=True).tolist()


def check_probabilities(model: nn.Module, who: str = "ARC") -> None:
    """Raise `NotAnEnsembleError` unless ``model`` says with which probability it draws each member."""
    if member_probabilities(model) is None:
        raise NotAnEnsembleError(
            f"{who} needs the probabilities with which members are drawn, and {type(model).__name__} has no tensor called "
            "probabilities, (M,): attack it with MORA or EOTAPGD"
        )


class ARC(DescentAttack):
    r"""An attack with ARC on an ensemble whose members are drawn with known probabilities, in the norms Linf and L2.

    The source is Dbouk & Shanbhag, ICML 2022, algorithm 1. Every boundary that is looked at costs a pass of its own, so that
    a round over M members spends ``2 M (planes + 1)`` passes.

    Arguments:
        model (nn.Module): a randomized ensemble: ``member_logits(x) -> (M, N, K)``, ``aggregate``, ``probabilities`` (M,).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): rounds over all members. (Default: 20)
        n_restarts (int): number of restarts; the first starts at the clean image, the others at random. (Default: 1)
        seed (int): seed of the random starts. (Default: 0)
        planes (int): of each member, the boundaries that are looked at, those with the largest other logits; the paper's are
            all K - 1, its authors' later BARRE's (ICML 2023) is 1. (Default: None: all)
        consistent (bool): whether the length of a step is computed from the distance to the round's point, as the paper's
            derivation has it; the authors' code takes the distance from where the members before have led. (Default: False)
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
        planes: int | None = None,
        consistent: bool = False,
        beyond: float = 0.05,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__("ARC", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size, box=box, mask=mask)
        self.n_restarts, self.planes, self.consistent, self.beyond = n_restarts, planes, consistent, beyond
        self._check()

    def _check(self) -> None:
        super()._check()
        check_count("n_restarts", self.n_restarts)
        if self.planes is not None:
            check_count("planes", self.planes)
        check_positive("beyond", self.beyond)

    def set_model(self, model: nn.Module) -> None:
        super().set_model(model)
        check_probabilities(model)

    def _stages(self, num_classes: int) -> list[Stage]:
        planes = 1 if self.targeted else min(self.planes or num_classes - 1, num_classes - 1)
        return [self._restart(restart, planes) for restart in range(self.n_restarts)]

    def _restart(self, restart: int, planes: int) -> Stage:
        turn = Turn(likeliest_first(self.model), planes)
        rule = partial(MemberSteps, turn=turn, norm=NORMS[self.norm], beyond=self.beyond, consistent=self.consistent)
        steps = 1 + turn.round * self.steps
        return Stage(partial(member_lead, turn), restart=restart, steps=steps, step_rule=rule, opening=not restart)
