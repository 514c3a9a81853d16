"""Implement MALT (Melamed, Yehudai, Shamir, "MALT Powers Up Adversarial Attacks", NeurIPS 2024).

It is targeted APGD that takes its targets in the order of their distance where the model is linear, rather than of their
scores: a class may be second best and far, because the scores hardly move towards it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ensemble_attacks.attacks.apgd import APGD
from ensemble_attacks.descent.objectives import Goal
from ensemble_attacks.norms import NORMS, UNIT, Box
from ensemble_attacks.scores import gather, mask_class
from ensemble_attacks.validation import check_count


class MALT(APGD):
    r"""An attack with MALT on classifiers of four classes or more, in the norms Linf and L2 (Melamed et al., NeurIPS 2024).

    Of the likeliest ``candidates`` other than the label, it aims at the ``targets`` of the smallest

    .. math:: s_c = (z_y - z_c) / \|\nabla_x (z_y - z_c)\|_q

    at the clean image, q the dual norm, smallest first, each in a descent of APGD on the targeted DLR. Where there are no
    more classes than ``targets``, the order alone is its own: it changes the cost, and hardly the result. A class towards
    which nothing moves comes last. Other than in the released code, reaching any wrong class is a success.

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K). Scores without a gradient of their own, as of hard votes, are
            ordered by that of their soft form.
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float or Tensor): radius of the ball, in the units of the images, or of each feature. (Default: 8/255)
        steps (int): gradient steps of each descent. (Default: 100)
        n_restarts (int): random starts of every target; each only on the samples still robust. (Default: 1)
        seed (int): seed of the random starts. (Default: 0)
        targets (int): wrong classes to aim at. (Default: 9)
        candidates (int): wrong classes to choose them from, each of which costs a backward pass. (Default: 100)
        rho (float): share of rising steps below which the step size is halved. (Default: 0.75)
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
        steps: int = 100,
        n_restarts: int = 1,
        seed: int = 0,
        *,
        targets: int = 9,
        candidates: int = 100,
        rho: float = 0.75,
        eot_iter: int | None = None,
        batch_size: int | None = None,
        box: Box = UNIT,
        mask: Tensor | None = None,
    ) -> None:
        self.candidates = candidates
        super().__init__(
            model,
            norm,
            eps,
            steps,
            n_restarts,
            seed,
            "dlr-targeted",
            rho=rho,
            targets=targets,
            eot_iter=eot_iter,
            batch_size=batch_size,
            box=box,
            mask=mask,
        )
        self.attack = "MALT"

    def _check(self) -> None:
        super()._check()
        check_count("candidates", self.candidates)

    def _goal(self, images: Tensor, labels: Tensor, targets: Tensor | None) -> Goal:
        goal = super()._goal(images, labels, targets)
        if targets is not None:
            return goal
        size = self.batch_size or max(len(images), 1)
        parts = zip(images.split(size), labels.split(size), strict=True)
        return replace(goal, ranked=torch.cat([self._ranked(*part) for part in parts]))

    def _ranked(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the classes by how near they are where the model is linear, the label last, (N, K)."""
        x = images.detach().requires_grad_()
        with torch.enable_grad():
            scores_NK = self.outputs(x).scores_NK
            likeliest_NK = mask_class(scores_NK.detach(), labels).argsort(dim=-1, descending=True, stable=True)
            if not scores_NK.requires_grad:  # the descent says so
                return likeliest_NK
            distances_NC = []
            for candidates_N in likeliest_NK[:, : min(self.candidates, scores_NK.shape[1] - 1)].unbind(1):
                lead_N = gather(scores_NK, labels) - gather(scores_NK, candidates_N)
                (slope,) = torch.autograd.grad(lead_N.sum(), x, retain_graph=True, materialize_grads=True)
                distances_NC.append(lead_N.detach() / NORMS[self.norm].dual_size(slope))
        order_NC = torch.stack(distances_NC, 1).nan_to_num(nan=torch.inf).argsort(dim=-1, stable=True)
        nearest_NC = likeliest_NK.gather(1, order_NC)
        return torch.cat([nearest_NC, likeliest_NK[:, order_NC.shape[1] :]], 1)
