"""The record of all that is known of an attack: what makes it, what it needs of a model, where it is defined.

Nothing here imports torch before an attack is made, or a model is checked: the command line's help reads the records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torchattacks.attack import Attack

SMALLEST = 5  # pixels a side that AutoAttack's Square divides into windows
MEMBERS, FRONTEND, PROBABILITIES = "members", "a part called frontend", "the probabilities of its members"
PAPERS = {  # where the sources of the records are to be read
    "Athalye et al., ICML 2018": "https://arxiv.org/abs/1802.00420",
    "Yu et al., NeurIPS 2022": "https://arxiv.org/abs/2211.08008",
    "arXiv:2411.14834": "https://arxiv.org/abs/2411.14834",
    "Madry et al., ICLR 2018": "https://arxiv.org/abs/1706.06083",
    "Carlini & Wagner, S&P 2017": "https://arxiv.org/abs/1608.04644",
    "Yu et al., CVPR 2021": "https://arxiv.org/abs/2104.09284",
    "Dbouk & Shanbhag, ICML 2022": "https://arxiv.org/abs/2206.06737",
    "Liu et al., CVPR 2022": "https://arxiv.org/abs/2203.05154",
    "Mao et al., AAAI 2021": "https://arxiv.org/abs/2012.05434",
    "Croce & Hein, ICML 2020": "https://arxiv.org/abs/2003.01690",
    "arXiv:2402.17018": "https://arxiv.org/abs/2402.17018",
    "Dbouk & Shanbhag, ICML 2023": "https://arxiv.org/abs/2302.01375",
    "arXiv:2307.10788": "https://arxiv.org/abs/2307.10788",
    "Xie et al., CVPR 2025": "https://arxiv.org/abs/2411.15210",
    "Melamed et al., NeurIPS 2024": "https://arxiv.org/abs/2407.02240",
    "Spall, IEEE TAC 1992": "https://doi.org/10.1109/9.119632",
}


def _needs() -> dict[str, Callable[[nn.Module, str], object]]:
    """Return what an attack may need of a model, and how that is told."""
    from ensemble_attacks.attacks.arc import check_probabilities
    from ensemble_attacks.models.ensembles import check_members
    from ensemble_attacks.models.parts import find_parts

    return {
        MEMBERS: check_members,
        FRONTEND: lambda model, name: find_parts(model, "frontend"),
        PROBABILITIES: check_probabilities,
    }


@dataclass(frozen=True, eq=False)
class NamedAttack:
    """A record of all that is known of an attack.

    Attributes:
        summary: what it does, in one line.
        make: the function (model, norm, eps, seed, batch_size, eot_iter) -> a torchattacks ``Attack``; ``None`` for
            AutoAttack's own attacks and for pipelines of several.
        needs: what it needs of a model, such as `MEMBERS`.
        norms: the norms that it is defined for.
        fewest_classes: the smallest number of classes that it is defined for.
        square: the norms in which images must be squares of at least `SMALLEST` pixels a side.
        images_only: whether inputs must be images (N, C, H, W).
        cost: the largest number of forward and backward passes of an image that holds out; of a random model, times its
            draws.
        source: the paper, a key of `PAPERS`.
    """

    summary: str
    make: Callable[..., Attack] | None = None
    needs: tuple[str, ...] = ()
    norms: tuple[str, ...] = ("Linf", "L2")
    fewest_classes: int = 2
    square: tuple[str, ...] = ()
    images_only: bool = False
    cost: int | None = None
    source: str = ""

    @property
    def needs_members(self) -> bool:
        """Tell whether it looks inside an ensemble."""
        return MEMBERS in self.needs

    def check(self, model: nn.Module, name: str = "the attack") -> None:
        """Raise on a model that it cannot be run on."""
        for need in self.needs:
            _needs()[need](model, name)

    def misfit(self, classes: int, norm: str, shape: Sequence[int]) -> str:
        """Return why it cannot attack inputs of this shape, without the batch, in this norm; empty where it can."""
        if norm not in self.norms:
            return f"it knows the norms {', '.join(self.norms)}, not {norm}"
        if classes < self.fewest_classes:
            return f"it needs at least {self.fewest_classes} classes, the model has {classes}"
        if self.images_only and len(shape) != 3:
            return f"it needs images (N, C, H, W), not inputs (N, {', '.join(map(str, shape))})"
        if norm in self.square and (shape[-1] != shape[-2] or shape[-1] < SMALLEST):
            return (
                f"in {norm} it needs squares of at least {SMALLEST} x {SMALLEST} pixels, not {shape[-2]} x {shape[-1]} ones"
            )
        return ""
