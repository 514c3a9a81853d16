"""Implement PGD with restarts (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018).

It runs in the loop of every attack here; on the margin of the logits it is the Linf form of Carlini and Wagner's attack that
ensemble defenses are evaluated with.
"""

from __future__ import annotations

from torch import Tensor, nn

from ensemble_attacks.attacks.base import LOG_EXPECTED, DescentAttack
from ensemble_attacks.descent.objectives import Objective, cross_entropy, lead, log_expected, of_scores
from ensemble_attacks.descent.stages import Stage
from ensemble_attacks.descent.steps import ConstantSteps
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.validation import check_choice, check_count, check_positive

OBJECTIVES: dict[str, Objective] = {"ce": of_scores(cross_entropy), "margin": of_scores(lead), LOG_EXPECTED: log_expected}


class PGD(DescentAttack):
    r"""An attack with PGD on any classifier, in the norms Linf and L2, as the MORA paper runs it (Madry et al., ICLR 2018).

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        alpha (float): step size; with eps for each feature, as a share of it. (Default: None: eps / 4)
        steps (int): gradient steps of each restart. (Default: 100)
        n_restarts (int): random starts, each only on the samples still robust. (Default: 5)
        seed (int): seed of the random starts. (Default: 0)
        loss (str): what is climbed, ``"ce"``, ``"margin"`` (CW: the best other logit minus the label's) or, of a random
            model, ``"log-expected"`` (minus the logarithm of the label's expected probability). (Default: ``"ce"``)
        eot_iter (int): draws of every iterate of a random model. (Default: None: the model is deterministic)
        batch_size (int): samples per pass. (Default: None: all at once)
        box (Box): the values that images can take. (Default: [0, 1])
        mask (Tensor): what may move, bool, of one image or of each. (Default: None: all)

    Shape:
        - images: :math:`(N, ...)`, such as :math:`(N, C, H, W)`, floating point in the box
        - labels: :math:`(N)`, integer class indices
        - output: as images
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        alpha: float | None = None,
        steps: int = 100,
        n_restarts: int = 5,
        seed: int = 0,
        loss: str = "ce",
        *,
        eot_iter: int | None = None,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__("PGD", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size, box=box, mask=mask)
        self.alpha, self.n_restarts, self.loss, self.eot_iter = alpha, n_restarts, loss, eot_iter
        self._check()

    def _check(self) -> None:
        super()._check()
        if self.alpha is not None:
            check_positive("alpha", self.alpha)
        check_count("n_restarts", self.n_restarts)
        check_choice("loss", self.loss, tuple(OBJECTIVES))

    def _step_rule(self, x: Tensor, *, eps: float, steps: int) -> ConstantSteps:
        return ConstantSteps(x, eps=eps, steps=steps, share=0.25 if self.alpha is None else self.alpha / eps)

    def _stages(self, num_classes: int) -> list[Stage]:
        return [Stage(OBJECTIVES[self.loss], restart=restart) for restart in range(self.n_restarts)]
