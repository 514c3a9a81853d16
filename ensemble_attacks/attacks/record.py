"""The record of all that is known of an attack: what makes it, what it needs of a model, where it is defined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.arc import check_probabilities
from ensemble_attacks.models.ensembles import check_members
from ensemble_attacks.models.parts import find_parts

SMALLEST = 5  # pixels a side that AutoAttack's Square divides into windows
MEMBERS, FRONTEND, PROBABILITIES = "members", "a part called frontend", "the probabilities of its members"
NEEDS: dict[str, Callable[[nn.Module, str], object]] = {  # what an attack may need of a model, and how that is told
    MEMBERS: check_members,
    FRONTEND: lambda model, name: find_parts(model, "frontend"),
    PROBABILITIES: lambda model, name: check_probabilities(model),
}


@dataclass(frozen=True, eq=False)
class NamedAttack:
    """A record of all that is known of an attack.

    Attributes:
        summary: what it does, in one line.
        make: the function (model, norm, eps, seed, batch_size, eot_iter) -> a torchattacks ``Attack``; ``None`` for
            AutoAttack's own attacks and for pipelines of several.
        needs: what it needs of a model, as keys of `NEEDS`.
        norms: the norms that it is defined for.
        fewest_classes: the smallest number of classes that it is defined for.
        square: the norms in which images must be squares of at least `SMALLEST` pixels a side.
        images_only: whether inputs must be images (N, C, H, W).
        cost: the largest number of forward and backward passes of an image that holds out; of a random model, times its
            draws.
        source: the paper.
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
            NEEDS[need](model, name)

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
