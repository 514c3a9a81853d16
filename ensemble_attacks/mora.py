"""MORA: Model-Reweighing Attack (Yu, Gao, Xu, "MORA: Improving Ensemble Robustness Evaluation with Model-Reweighing
Attack", NeurIPS 2022).

It breaks ensembles whose members were trained to have diverse gradients: instead of the ensemble's own gradient, in which
members far from their boundary drown or cancel the others, it follows the members whose change moves the vote most
(equations 7-12; see `objectives.mora`), with a cosine step and momentum 0.75 (Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ensemble_attacks.base import DescentAttack
from ensemble_attacks.descent import CLOSEST, Outputs, Stage
from ensemble_attacks.objectives import WEIGHT_RULES, mora
from ensemble_attacks.steps import CosineSteps
from ensemble_attacks.validation import check_choice, check_count, check_fractions, check_positive

TARGETED_BETA = 0.5  # of the multi-targeted stage (MORA, section 4.1)
SHORT, FEWEST_STEPS = 6, 5  # descents of an eighth of the first beta's steps, where that is not less than so many


class MORA(DescentAttack):
    r"""MORA, in the norms Linf and L2.

    A descent for each beta, then, with ``targets``, that many more at the beta 0.5; each only on the samples that are still
    robust, those with the smallest margin first. The first beta's steps are spent in seven descents, as most samples need
    few steps, and most others the right class rather than many: one from the clean image, untargeted, then six of an eighth
    of the steps. These and the later ones start at random and aim, sample by sample, at the wrong class that has come
    closest in all iterates so far, among those that the fewest descents of as many steps or more have aimed at. The paper's
    sweep is one untargeted descent a beta (``aimed=False``), where different betas mostly end at the same class, and its
    targets are the likeliest classes of the clean image; under hard votes both leave more samples robust.

    Arguments:
        model (nn.Module): an ensemble: ``member_logits(x) -> (M, N, K)`` and ``aggregate(member_logits) -> (N, K)``.
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float): radius of the ball, in pixel units of [0, 1]. (Default: 8/255)
        steps (int): gradient steps for each beta, and for each target. (Default: 100)
        betas (sequence of float): shares of the reweighed members, eq. 11, in order. (Default: (0.5, 0, 0.25, 0.75, 1))
        targets (int): descents at single classes after the sweep; at most one less than there are classes. (Default: 0)
        tau (float): temperature of the members' softmax, eq. 10. (Default: None: 1; each member's gap under hard votes)
        seed (int): of the random starts. (Default: 0)
        aimed (bool): whether the first beta's descent is cut, and all but the first aim at single classes. (Default: True)
        weight_rule (str): the reading of eq. 10: ``"derivative"``, ``"published"``, ``"runner-up"`` or ``"code"``.
        eot_iter (int): of a random model, draws of every iterate. (Default: None: the model is deterministic)
        batch_size (int): samples per pass. (Default: None: all at once)

    Raises:
        NotAnEnsembleError: ``model`` shows no members; `as_ensemble` can name them.

    Shape:
        - images: :math:`(N, C, H, W)`, floating point in [0, 1]
        - labels: :math:`(N)`, integer class indices
        - output: :math:`(N, C, H, W)`

    Examples::
        >>> import torch
        >>> from ensemble_attacks import MORA, Ensemble
        >>> members = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2)]
        >>> images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> attack = MORA(Ensemble(members, vote="softmax"), eps=0.01, steps=10)
        >>> attack(images, labels).shape
        torch.Size([5, 3, 2, 2])
    """

    needs_members = True
    step_rule = CosineSteps

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 100,
        betas: Sequence[float] = (0.5, 0.0, 0.25, 0.75, 1.0),
        targets: int = 0,
        tau: float | None = None,
        seed: int = 0,
        *,
        aimed: bool = True,
        weight_rule: str = "derivative",
        eot_iter: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        super().__init__("MORA", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size)
        self.eot_iter = eot_iter
        self.betas, self.targets, self.tau, self.aimed, self.weight_rule = betas, targets, tau, aimed, weight_rule
        self._check()

    def _check(self) -> None:
        super()._check()
        check_fractions("betas", self.betas)
        check_count("targets", self.targets, at_least=0)
        if self.tau is not None:
            check_positive("tau", self.tau)
        check_choice("weight_rule", self.weight_rule, WEIGHT_RULES)

    def sweep(self) -> list[tuple[float, int]]:
        """Beta and steps of each descent, but for those at ``targets``."""
        first, *others = self.betas
        eighth = self.steps // 8
        short = [(first, eighth)] * (SHORT if self._aims and eighth >= FEWEST_STEPS else 0)
        return [(first, self.steps - eighth * len(short)), *short, *((beta, self.steps) for beta in others)]

    @property
    def _aims(self) -> bool:
        return self.aimed and not self.targeted

    def _opening(self) -> Stage | None:
        beta, steps = self.sweep()[0]
        return Stage(partial(self._loss, beta), steps=steps) if self._aims else None

    def _stages(self, num_classes: int) -> list[Stage]:
        sweep = self.sweep()
        untargeted = 0 if self._aims else len(sweep)
        targets = 0 if self.targeted else min(self.targets, num_classes - 1)
        descents = [*sweep[self._aims :], *[(TARGETED_BETA, self.steps)] * targets]
        return [
            Stage(partial(self._loss, beta), target_rank=None if r < untargeted else CLOSEST, restart=r, steps=steps)
            for r, (beta, steps) in enumerate(descents)
        ]

    def _loss(self, beta: float, outputs: Outputs, labels: Tensor, targets: Tensor | None) -> Tensor:
        assert outputs.logits_MNK is not None
        if self.targeted:
            labels = self.rivals(outputs, targets)
        return mora(
            outputs.logits_MNK,
            outputs.scores_NK,
            labels,
            targets,
            beta=beta,
            vote=getattr(self.model, "vote", None),
            probabilities=outputs.weights_E,
            tau=self.tau,
            rule=self.weight_rule,
        )
