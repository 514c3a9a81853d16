"""Implement the Lattice Climber Attack (Gnecco Heredia, Negrevergne & Chevaleyre, "Adversarial Attacks for Mixtures of
Classifiers", arXiv:2307.10788; extended in arXiv:2506.10888), in the loop of every attack here.

The sets of members that one perturbation can fool at once form a lattice. The attack climbs it: it adds one member after
another to those that are fooled, along a hinge at which only members that are not fooled yet pull. No public code was found:
its constants are this package's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_attacks.attacks.arc import check_probabilities, likeliest_first
from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.descent.balls import Ball
from ensemble_attacks.descent.objectives import Goal
from ensemble_attacks.descent.stages import Stage
from ensemble_attacks.descent.steps import StepRule
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.scores import per_sample
from ensemble_attacks.validation import check_count, check_positive


def _none() -> Tensor:
    return torch.zeros(0, 0, dtype=torch.bool)


@dataclass(eq=False)
class Climb:
    """A record that the objective and the steps of a climb share.

    Attributes:
        order: the members in the order in which they are taken, which is that of the tensors here.
        hinge: by how much a member has to be wrong before it pulls no more, in logits.
        wanted: the members that are climbed for, (M, N) bool, of the samples of the last step.
        wrong: the members that were wrong in the last look, (M, N) bool; of several draws, in all.
    """

    order: list[int]
    hinge: float
    wanted: Tensor = field(default_factory=_none)
    wrong: Tensor = field(default_factory=_none)


def reverse_hinge(climb: Climb, outputs: Outputs, goal: Goal) -> Tensor:
    """Return minus the sum of ``max(0, hinge + margin)`` over the members that are wanted, (N,); 0 where all are wrong."""
    assert outputs.logits_MNK is not None
    margin_MN = goal.margin(torch.stack([outputs.logits_MNK[member] for member in climb.order]))
    members, samples = margin_MN.shape
    known = climb.wanted.shape[1]
    copies = samples // known if known and samples % known == 0 else 0
    # Before a stage's first step nobody has said what is wanted, and nobody goes by it.
    wanted_MN = climb.wanted.repeat(1, copies) if copies else torch.ones_like(margin_MN, dtype=torch.bool)
    climb.wrong = (margin_MN.detach() < 0).view(members, copies or 1, -1).all(1)
    return -((climb.hinge + margin_MN).clamp_min(0) * wanted_MN).sum(0)


class ClimbingSteps(StepRule):
    """A rule that climbs for one more member at a time, sample by sample, each time with steps from eps down to 0.

    A climb ends where all that are wanted are wrong: these are kept. After ``length`` steps it has failed: the sample goes
    back to what it had kept, and the next member is tried. After the last one it begins anew, at the clean image and another
    member.
    """

    def __init__(self, x: Tensor, *, eps: float, steps: int, climb: Climb, length: int) -> None:
        super().__init__(x, eps=eps, steps=steps)
        self.climb, self.length, self.kept = climb, length, x
        self.fooled = torch.zeros(len(x), len(climb.order), dtype=torch.bool, device=x.device)  # those kept
        self.failed = self.fooled
        self.begun = torch.zeros(len(x), dtype=torch.long, device=x.device)  # the member that came first
        self.turn, self.used = self.begun, self.begun  # the member that is tried, and its steps so far
        self._want()

    def _want(self) -> None:
        self.wanted = self.fooled | self._one(self.turn)
        self.climb.wanted = self.wanted.T

    def _one(self, member: Tensor) -> Tensor:
        return F.one_hot(member, self.fooled.shape[1]).bool()

    def select(self, rows: Tensor) -> None:
        if self.climb.wrong.shape[1] == len(self.fooled):  # seen in this descent
            self.climb.wrong = self.climb.wrong[:, rows]
        super().select(rows)

    def move(
        self, step: int, ball: Ball, previous: Tensor, x: Tensor, gradient: Tensor, loss: Tensor, margin: Tensor
    ) -> tuple[Tensor, Tensor]:
        if step == 0:  # the gradient is of no climb
            self._want()
            return x, x
        wrong = self.climb.wrong.T
        reached = (wrong | ~self.wanted).all(1)
        over = reached | (self.used == self.length)
        self.kept = torch.where(per_sample(reached, x), x, self.kept)
        self.fooled = torch.where(reached.unsqueeze(1), wrong, self.fooled)
        self.failed = self.failed | (self._one(self.turn) & (over & ~reached).unsqueeze(1))
        anew = over & (self.fooled | self.failed).all(1)
        self._begin(anew, ball)
        ahead = ball.project(x + per_sample(self._size(), x) * ball.steepest(gradient))
        self.turn = torch.where(over, self._following(), self.turn)
        self.used = torch.where(over, 0, self.used + 1)
        self._want()
        return x, torch.where(per_sample(over, x), self.kept, ahead)

    def _size(self) -> Tensor:
        """Return the sizes of the steps, (N,), half a cosine from eps to 0 over a climb."""
        return self.eps * (1 + torch.cos(math.pi * self.used / self.length)) / 2

    def _begin(self, anew: Tensor, ball: Ball) -> None:
        """Let some samples (N,) begin once more, with the member after the one that came first before."""
        self.begun = torch.where(anew, (self.begun + 1) % self.fooled.shape[1], self.begun)
        self.kept = torch.where(per_sample(anew, self.kept), ball.clean, self.kept)
        self.fooled, self.failed = (known & ~anew.unsqueeze(1) for known in (self.fooled, self.failed))

    def _following(self) -> Tensor:
        """Return the next member of every sample that is neither kept nor has failed, from the one that came first on."""
        members = self.fooled.shape[1]
        place = (torch.arange(members, device=self.begun.device) - self.begun.unsqueeze(1)) % members
        return (place + members * (self.fooled | self.failed)).argmin(1)


class LCA(DescentAttack):
    r"""An attack on an ensemble whose members are drawn with known probabilities, which fools one more of them at a time.

    The source is Gnecco Heredia et al., arXiv:2307.10788, in the norms Linf and L2. The members are tried in turn, the
    likeliest first; what counts is which of them are wrong, never their loss.

    Arguments:
        model (nn.Module): a randomized ensemble: ``member_logits(x) -> (M, N, K)``, ``aggregate``, ``probabilities`` (M,).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): gradient steps of each climb, of which a restart makes as many as there are members. (Default: 50)
        n_restarts (int): number of restarts; the first starts at the clean image, the others at random. (Default: 3)
        seed (int): seed of the random starts. (Default: 0)
        hinge (float): by how much a member has to be wrong before it pulls no more, in logits. (Default: 0.05)
        eot_iter (int): draws of every iterate where the members are random themselves. (Default: None: they are not)
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
        steps: int = 50,
        n_restarts: int = 3,
        seed: int = 0,
        *,
        hinge: float = 0.05,
        eot_iter: int | None = None,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__("LCA", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size, box=box, mask=mask)
        self.n_restarts, self.hinge, self.eot_iter = n_restarts, hinge, eot_iter
        self._check()

    def _check(self) -> None:
        super()._check()
        check_count("n_restarts", self.n_restarts)
        check_positive("hinge", self.hinge)

    def set_model(self, model: nn.Module) -> None:
        super().set_model(model)
        check_probabilities(model, "LCA")

    def _stages(self, num_classes: int) -> list[Stage]:
        return [self._restart(restart) for restart in range(self.n_restarts)]

    def _restart(self, restart: int) -> Stage:
        climb = Climb(likeliest_first(self.model), self.hinge)
        steps = 1 + len(climb.order) * (self.steps + 1)  # each climb, and the look after its last step
        rule = partial(ClimbingSteps, climb=climb, length=self.steps)
        return Stage(partial(reverse_hinge, climb), restart=restart, steps=steps, step_rule=rule, opening=not restart)
