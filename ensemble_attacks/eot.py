"""EOTAPGD: APGD (Croce & Hein 2020) of the expectation over a model's randomness (Athalye et al., "Synthesizing Robust
Adversarial Examples", ICML 2018; EOT).

AutoAttack's ``rand`` averages the gradient alone, and books one lucky draw as a success. Here loss, success, best iterate
and the decisions about the step size are all means over the draws.
"""

from __future__ import annotations

from torch import nn

from ensemble_attacks.apgd import APGD


class EOTAPGD(APGD):
    r"""APGD on a random model, in the norms Linf and L2.

    A sample is fooled where neither the draws of an iterate nor twenty further ones are right; of the others, the image with
    the smallest share of right draws is returned. `judge`, with ``draws``, says what it is worth on fresh ones.

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K), random. If it names its members and their ``probabilities``,
            the expectation over them is exact; draws are then only taken if the members are random themselves.
        norm (str): ``"Linf"`` or ``"L2"``. (Default: ``"Linf"``)
        eps (float): radius of the ball, in pixel units of [0, 1]. (Default: 8/255)
        steps (int): gradient steps of each descent. (Default: 100)
        n_restarts (int): random starts. (Default: 1)
        seed (int): of the random starts, and of PyTorch's, NumPy's and Python's global generators. (Default: 0)
        loss (str): ``"ce"``, ``"dlr"`` or ``"dlr-targeted"``. (Default: ``"ce"``)
        eot_iter (int): draws of every iterate. (Default: 20)
        draws_per_pass (int): draws that go through the model as one batch; more than 1 only for a model that draws for each
            image by itself. (Default: 1)
        batch_size (int): samples per pass. (Default: None: all at once)

    Shape:
        - images: :math:`(N, C, H, W)`, floating point in [0, 1]
        - labels: :math:`(N)`, integer class indices
        - output: :math:`(N, C, H, W)`
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
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
    ) -> None:
        super().__init__(model, norm, eps, steps, n_restarts, seed, loss, rho=rho, targets=targets, batch_size=batch_size)
        self.attack, self.eot_iter, self.draws_per_pass = "EOTAPGD", eot_iter, draws_per_pass
        self._check()
