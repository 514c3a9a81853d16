"""Implement APGD, Auto-PGD (Croce & Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse
Parameter-free Attacks", ICML 2020), in the same loop as every attack here: a sample stops costing passes once it is fooled.

It climbs cross-entropy, a margin, the difference of logits ratio (eq. 6), or its targeted form (eq. 7) towards each of the
likeliest wrong classes.
"""

from __future__ import annotations

from torch import Tensor, nn

from ensemble_attacks.attacks.base import DescentAttack
from ensemble_attacks.attacks.pgd import OBJECTIVES as PLAIN
from ensemble_attacks.descent.objectives import Objective, of_scores, ratio
from ensemble_attacks.descent.stages import Stage
from ensemble_attacks.descent.steps import CheckpointSteps
from ensemble_attacks.norms import UNIT, Box
from ensemble_attacks.validation import check_choice, check_count, check_fractions

OBJECTIVES: dict[str, Objective] = {**PLAIN, "dlr": of_scores(ratio), "dlr-targeted": of_scores(ratio)}
FEWEST_CLASSES = {"dlr": 3, "dlr-targeted": 4}  # others need 2


class APGD(DescentAttack):
    r"""An attack with APGD on any classifier, in the norms Linf and L2 (Croce & Hein, ICML 2020).

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K).
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): gradient steps of each descent; AutoAttack's number. (Default: 100)
        n_restarts (int): random starts; each only on the samples still robust. (Default: 1)
        seed (int): seed of the random starts. (Default: 0)
        loss (str): ``"ce"``, ``"margin"``, ``"dlr"``, ``"dlr-targeted"`` or ``"log-expected"`` (`PGD`). (Default: ``"ce"``)
        rho (float): share of rising steps below which the step size is halved. (Default: 0.75)
        targets (int): wrong classes that ``"dlr-targeted"`` aims at. (Default: 9)
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
        >>> from ensemble_attacks import APGD
        >>> images, labels = torch.rand(5, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> APGD(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), eps=0.01, steps=10)(images, labels).shape
        torch.Size([5, 3, 2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float | Tensor = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
        *,
        rho: float = 0.75,
        targets: int = 9,
        eot_iter: int | None = None,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(
            "APGD", model, norm=norm, eps=eps, steps=steps, seed=seed, batch_size=batch_size, box=box, mask=mask
        )
        self.n_restarts, self.loss, self.rho, self.targets, self.eot_iter = n_restarts, loss, rho, targets, eot_iter
        self._check()

    def _check(self) -> None:
        super()._check()
        check_count("n_restarts", self.n_restarts)
        check_choice("loss", self.loss, tuple(OBJECTIVES))
        check_fractions("rho", (self.rho,))
        check_count("targets", self.targets)

    def _step_rule(self, x: Tensor, *, eps: float, steps: int) -> CheckpointSteps:
        return CheckpointSteps(x, eps=eps, steps=steps, rho=self.rho)

    def _stages(self, num_classes: int) -> list[Stage]:
        fewest = FEWEST_CLASSES.get("dlr-targeted" if self.targeted and self.loss == "dlr" else self.loss, 2)
        if num_classes < fewest:
            raise ValueError(f"loss {self.loss!r} needs at least {fewest} classes, the model has {num_classes}: use 'ce'")
        ranks: list[int | None] = [None]
        if self.loss == "dlr-targeted" and not self.targeted:
            ranks = list(range(1, min(self.targets, num_classes - 1) + 1))
        stages = [(restart, rank) for restart in range(self.n_restarts) for rank in ranks]
        return [Stage(OBJECTIVES[self.loss], target_rank=rank, restart=r) for r, (_, rank) in enumerate(stages)]


class EOTAPGD(APGD):
    r"""An attack with APGD on a random model, in the norms Linf and L2, that follows the expectation over draws.

    A sample is fooled where neither the draws of an iterate nor twenty further ones are right; of the others, the image with
    the smallest share of right draws is returned. `judge`, with ``draws``, says what it is worth on fresh draws.

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K), random. If it names its members and their ``probabilities``,
            the expectation over them is exact; draws are then only taken if the members are random themselves.
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): gradient steps of each descent. (Default: 100)
        n_restarts (int): random starts. (Default: 1)
        seed (int): seed of the random starts, and of PyTorch's, NumPy's and Python's global generators. (Default: 0)
        loss (str): the mean over draws of ``"ce"``, ``"margin"``, ``"dlr"`` or ``"dlr-targeted"``; or ``"log-expected"``,
            minus the logarithm of the label's expected probability, in which members that are wrong already weigh little.
            (Default: ``"ce"``)
        eot_iter (int): draws of every iterate. (Default: 20)
        rho (float): share of rising steps below which the step size is halved. (Default: 0.75)
        targets (int): wrong classes that ``"dlr-targeted"`` aims at. (Default: 9)
        draws_per_pass (int): draws that go through the model as one batch; more than 1 only for a model that draws for each
            image by itself. (Default: 1)
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
        steps: int = 100,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
        eot_iter: int = 20,
        *,
        rho: float = 0.75,
        targets: int = 9,
        draws_per_pass: int = 1,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(
            model,
            norm,
            eps,
            steps,
            n_restarts,
            seed,
            loss,
            rho=rho,
            targets=targets,
            batch_size=batch_size,
            box=box,
            mask=mask,
        )
        self.attack, self.eot_iter, self.draws_per_pass = "EOTAPGD", eot_iter, draws_per_pass
        self._check()
