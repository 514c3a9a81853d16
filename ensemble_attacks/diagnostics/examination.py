"""Hold what an examination works with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchattacks.attack import Attack

from ensemble_attacks.attacks.apgd import EOTAPGD
from ensemble_attacks.attacks.pgd import PGD
from ensemble_attacks.judge import judge
from ensemble_attacks.models.gradients import scores_and_gradient
from ensemble_attacks.models.passes import count_passes
from ensemble_attacks.models.structure import structure_of
from ensemble_attacks.models.twins import prepare
from ensemble_attacks.norms import UNIT
from ensemble_attacks.scores import margin

STEPS = 20  # of the attacks below
FEWEST_DIAGNOSED = 4  # images
DRAWS = 10  # by which a random model is judged
EOT_ITER = 5
ALONE = 8  # images on which an attack is looked at one by one
UNBOUNDED = 0.5  # radius at which every image can become any other [C19]


class Examination:
    """A model that is looked at, and what looking takes: attacks, gradients, noise, accuracies."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        eps: float,
        seed: int,
        attack: Callable[[nn.Module, float], Attack] | None,
        alone: int = ALONE,
        on_pass: Callable[[int], object] | None = None,
    ) -> None:
        self.original, self.x, self.y, self.eps, self.seed, self.alone = model, x, y, eps, seed, alone
        self.structure = structure_of(model, x, seed)
        self.twin = prepare(model, x[:8])
        self.counted = count_passes(self.twin, on_pass)
        self.model: Any = self.counted
        self.eot_iter = EOT_ITER if self.structure.random else None
        self.attack = attack or self.default_attack

    def passes(self) -> float:
        return (self.counted.forwards + self.counted.backwards) / len(self.x)

    def default_attack(self, model: nn.Module, eps: float) -> Attack:
        if self.eot_iter:
            return EOTAPGD(model, eps=eps, steps=STEPS, seed=self.seed, eot_iter=self.eot_iter)
        return PGD(model, eps=eps, steps=50, n_restarts=1, seed=self.seed)

    def pgd(self, model: nn.Module, steps: int, eps: float, step_size: float | None = None, loss: str = "ce") -> Tensor:
        if self.gradient(model, self.x[:1]) is None:
            return self.x
        if step_size is None:
            arguments: dict[str, Any] = dict(eps=eps, steps=steps, seed=self.seed)
            if self.eot_iter:
                return EOTAPGD(model, eot_iter=self.eot_iter, **arguments)(self.x, self.y)
            return PGD(model, n_restarts=1, loss=loss, **arguments)(self.x, self.y)
        gradient = self.gradient(model, self.x, F.cross_entropy)
        assert gradient is not None
        return UNIT.clamp(self.x + step_size * gradient.nan_to_num().sign())

    def accuracy(self, images: Tensor) -> float:
        draws = DRAWS if self.structure.random else 1
        return judge(self.original, self.x, self.y, images, eps=1.0, draws=draws).accuracy

    def gradient(self, model: nn.Module, x: Tensor, loss: Any = None) -> Tensor | None:
        """Return the gradient of the negative margin, or of another loss, at versions of the first images (n, ...).

        It is ``None`` where there is none.
        """
        y = self.y[: len(x)]

        def value(scores_NK: Tensor) -> Tensor:
            return -margin(scores_NK, y).sum() if loss is None else loss(scores_NK, y, reduction="sum")

        return scores_and_gradient(model, x, value)[1]

    def noise(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1000 + seed)
        return (2 * torch.rand(self.x.shape, generator=generator, device="cpu") - 1).to(self.x)

    def surrogate(self) -> str:
        """Return the name of the attack on a stand-in that the structure allows; empty if there is none."""
        if self.structure.frontend:
            return "bpda"
        return "crossmax-transfer" if self.structure.members else ""


def lengths(gradient: Tensor) -> Tensor:
    return gradient.flatten(1).norm(dim=1)


def share(found: Tensor) -> float:
    return found.double().mean().item()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.flatten(1), b.flatten(1))
