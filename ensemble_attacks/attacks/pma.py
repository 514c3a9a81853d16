"""Implement PMA, the probability margin attack (Xie et al., "Towards Million-Scale Adversarial Robustness Evaluation With
Stronger Individual Attacks", CVPR 2025).

It climbs the margin of probabilities, in which samples far from the boundary weigh little, by the schedule of margin
decomposition (Ma et al., "Imbalanced Gradients", Machine Learning 2023): first one term of the margin alone, then both.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.descent.objectives import Goal, of_scores
from ensemble_attacks.descent.stages import Stage
from ensemble_attacks.descent.steps import CosineSteps
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.scores import gather, mask_class
from ensemble_attacks.validation import check_count


class PlainCosineSteps(CosineSteps):
    """A rule with steps from twice eps down to 0 along half a cosine, and no momentum."""

    momentum = 1.0


def not_left(scores_NK: Tensor, goal: Goal) -> Tensor:
    """Return ``1 - p_y``, (N,), as the sum of the others' probabilities.

    A difference from 1 would be 0, and its gradient too, where p_y rounds to 1.
    """
    log_p_NK = scores_NK.log_softmax(-1)
    return mask_class(log_p_NK, goal.overtaken(scores_NK)).logsumexp(-1).exp()


def reached(scores_NK: Tensor, goal: Goal) -> Tensor:
    """Return ``max_{j != y} p_j``, or p_t towards a class t, (N,)."""
    log_p_NK = scores_NK.log_softmax(-1)
    if goal.reach is not None:
        return gather(log_p_NK, goal.reach).exp()
    return mask_class(log_p_NK, goal.leave).amax(-1).exp()


def probability_margin(scores_NK: Tensor, goal: Goal) -> Tensor:
    """Return ``max_{j != y} p_j - p_y``, or ``p_t - p_y`` towards a class t, (N,) (PMA's loss)."""
    return reached(scores_NK, goal) + not_left(scores_NK, goal) - 1


TERMS: tuple[Callable[[Tensor, Goal], Tensor], ...] = (not_left, reached)  # of the margin, that the first half climbs


class PMA(DescentAttack):
    r"""An attack with PMA on any classifier, in the norms Linf and L2 (Xie et al., CVPR 2025).

    Each restart is two descents from random starts. Half of the steps of the first climb ``-p_y``, of the second
    ``max_{j != y} p_j``; the other half, from where these end, both. Each half's steps go from twice eps to 0. The released
    code's first step climbs ``p_y``, and so goes back; here there is no such step.

    The probabilities are the softmax of the model's scores: of an ensemble's mean logits that of the mean, of a mean
    probability (whose scores are its logarithm) the mean probability itself.

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): gradient steps of each descent, at least two. (Default: 100)
        n_restarts (int): pairs of descents, each only on the samples still robust. (Default: 1)
        seed (int): seed of the random starts. (Default: 0)
        eot_iter (int): draws of every iterate of a random model. (Default: None: the model is deterministic)
        batch_size (int): samples per pass. (Default: None: all at once)
        box (Box): the values that images can take. (Default: [0, 1])
        mask (Tensor): what may move, bool, of one image or of each. (Default: None: all)

    Shape:
        - images: :math:`(N, ...)`, such as :math:`(N, C, H, W)`, floating point in the box
        - labels: :math:`(N)`, integer class indices
        - output: as images

    Examples::
        >>> import torch
        >>> from ensemble_attacks import PMA
        >>> images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> PMA(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), eps=0.01, steps=10)(images, labels).shape
        torch.Size([5, 3, 2, 2])
    """

    step_rule = PlainCosineSteps

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        seed: int = 0,
        *,
        eot_iter: int | None = None,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__("PMA", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size, box=box, mask=mask)
        self.n_restarts, self.eot_iter = n_restarts, eot_iter
        self._check()

    def _check(self) -> None:
        super()._check()
        check_count("steps", self.steps, at_least=2)
        check_count("n_restarts", self.n_restarts)

    def _stages(self, num_classes: int) -> list[Stage]:
        first, stages = self.steps // 2, []
        for restart in range(self.n_restarts):
            for index, term in enumerate(TERMS):
                stages.append(Stage(of_scores(term), restart=len(TERMS) * restart + index, steps=first))
                stages.append(Stage(of_scores(probability_margin), resume=True, steps=self.steps - first))
        return stages
