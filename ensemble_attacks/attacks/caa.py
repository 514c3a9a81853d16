"""Implement CAA, Composite Adversarial Attacks (Mao et al., AAAI 2021): the Linf policy that its search found for CIFAR-10,
in which each attack starts where the one before ended.

The released code aims by targeted DLR, from a new random start for every class, and takes its CW steps without momentum;
here every descent climbs the plain difference of the logits with APGD's steps, and goes on from the last.
"""

from __future__ import annotations

from itertools import product

from torch import Tensor, nn

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.descent.objectives import lead, of_scores
from ensemble_attacks.descent.stages import Stage
from ensemble_attacks.descent.steps import CheckpointSteps
from ensemble_attacks.norms import UNIT, Box

TARGETS = 9


class CAA(DescentAttack):
    r"""An attack with CAA's published Linf policy, on any classifier (Mao et al., AAAI 2021).

    It is multi-targeted with 50 steps, again with 25, then CW with 125, all with APGD's steps; in these proportions where
    ``steps`` is set to another number than 125.

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        seed (int): seed of the random start. (Default: 0)
        batch_size (int): samples per pass. (Default: None: all at once)
        box (Box): the values that images can take. (Default: [0, 1])
        mask (Tensor): what may move, bool, of one image or of each. (Default: None: all)

    Shape:
        - images: :math:`(N, ...)`, such as :math:`(N, C, H, W)`, floating point in the box
        - labels: :math:`(N)`, integer class indices
        - output: as images
    """

    step_rule = CheckpointSteps

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        seed: int = 0,
        *,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__("CAA", model, norm=norm, eps=eps, steps=125, seed=seed, batch_size=batch_size, box=box, mask=mask)
        self.supported_mode = ["default"]
        self._check()

    def _stages(self, num_classes: int) -> list[Stage]:
        ranks = range(1, min(TARGETS, num_classes - 1) + 1)
        aimed = enumerate(product((max(1, 2 * self.steps // 5), max(1, self.steps // 5)), ranks))
        stages = [Stage(of_scores(lead), target_rank=rank, steps=steps, resume=index > 0) for index, (steps, rank) in aimed]
        return [*stages, Stage(of_scores(lead), resume=True)]
