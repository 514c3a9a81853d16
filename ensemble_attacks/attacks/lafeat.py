"""Implement LAFEAT (Yu et al., "LAFEAT: Piercing Through Adversarial Defenses with Latent Features", CVPR 2021), in the loop
of every attack here.

It attacks through classifiers that read intermediate layers, which fall before the output does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.descent.objectives import Goal, cross_entropy, normalize_margin
from ensemble_attacks.descent.stages import CLOSEST, Stage
from ensemble_attacks.descent.steps import CosineSteps
from ensemble_attacks.models.view import Outputs
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.scores import margin
from ensemble_attacks.validation import check_count, check_fractions


class LAFEAT(DescentAttack):
    r"""An attack with LAFEAT on a model with probes, in the norms Linf and L2 (Yu et al., CVPR 2021).

    It makes one descent for each probe and beta; the first is untargeted, each later one aims at the wrong class that has
    come closest so far.

    Arguments:
        model (nn.Module): a model with ``member_logits(x) -> (M, N, K)``, the probes' logits and last the network's own, and
            ``aggregate``; an aggregation that masks its gradient is best replaced (`Surrogate`).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): gradient steps of each descent. (Default: 100)
        betas (sequence of float): shares of the probe in the mixture with the model's scores, eq. 6. (Default: (0.5,))
        probes (sequence of int): which probes, in order. (Default: None: all but the network's own logits, the last first)
        seed (int): seed of the random starts. (Default: 0)
        eot_iter (int): draws of every iterate of a random model. (Default: None: the model is deterministic)
        batch_size (int): samples per pass. (Default: None: all at once)
        box (Box): the values that images can take. (Default: [0, 1])
        mask (Tensor): what may move, bool, of one image or of each. (Default: None: all)

    Raises:
        NotAnEnsembleError: Where the model shows no members.

    Shape:
        - images: :math:`(N, ...)`, such as :math:`(N, C, H, W)`, floating point in the box
        - labels: :math:`(N)`, integer class indices
        - output: as images
    """

    needs_members = True
    step_rule = CosineSteps

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 100,
        betas: Sequence[float] = (0.5,),
        probes: Sequence[int] | None = None,
        seed: int = 0,
        *,
        eot_iter: int | None = None,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(
            "LAFEAT", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size, box=box, mask=mask
        )
        self.betas, self.probes, self.eot_iter = betas, probes, eot_iter
        self._members = 0
        self._check()

    def _check(self) -> None:
        super()._check()
        check_fractions("betas", self.betas)
        for probe in self.probes or ():
            check_count("probes", probe, at_least=0)

    def outputs(self, images: Tensor) -> Outputs:
        outputs = super().outputs(images)
        assert outputs.logits_MNK is not None
        self._members = len(outputs.logits_MNK)
        for probe in self.probes or ():
            if probe >= self._members:
                raise ValueError(
                    f"probes holds {probe}, but the model has {self._members} members (0 to {self._members - 1})"
                )
        return outputs

    def _stages(self, num_classes: int) -> list[Stage]:
        probes = range(self._members - 2, -1, -1) if self.probes is None else self.probes
        if not len(probes):
            raise ValueError("probes is empty: LAFEAT needs at least one beside the network's own logits; use APGD")
        pairs = [(probe, beta) for beta in self.betas for probe in probes]
        return [
            Stage(partial(self._loss, *pair), target_rank=CLOSEST if r and not self.targeted else None, restart=r)
            for r, pair in enumerate(pairs)
        ]

    def _loss(self, probe: int, beta: float, outputs: Outputs, goal: Goal) -> Tensor:
        """Return ``CE(beta m z^l / gap_l + (1 - beta m) z / gap, y)``, m = 1 where the probe l is right (LAFEAT, eq. 6)."""
        assert outputs.logits_MNK is not None
        leave, latent_NK = goal.overtaken(outputs.scores_NK), outputs.logits_MNK[probe]
        share_N1 = beta * (margin(latent_NK.detach(), leave) > 0).to(latent_NK).unsqueeze(-1)
        mixture_NK = share_N1 * normalize_margin(latent_NK, leave, goal.reach)
        mixture_NK = mixture_NK + (1 - share_N1) * normalize_margin(outputs.scores_NK, leave, goal.reach)
        return cross_entropy(mixture_NK, Goal(leave, goal.reach))
