"""Define what attacks made of other attacks have in common: they show and take the settings of their parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchattacks.attack import Attack

from ensemble_attacks.attacks.careful import CarefulAttack
from ensemble_attacks.norms import UNIT

ANYWHERE = {"box": UNIT, "mask": None}  # of parts that do not say


class ComposedAttack(CarefulAttack):
    """An attack that has other attacks as attributes.

    A setting that it has not itself, such as ``eps`` or ``seed``, is read from the first part that has it, and set in all
    that have it.
    """

    def _parts(self) -> list[Attack]:
        return list(self.__dict__.get("_attacks", {}).values())

    def _check(self) -> None:
        for part in self._parts():
            if isinstance(part, CarefulAttack):
                part._check()
            elif self.box != UNIT or self.mask is not None:
                raise ValueError(f"{type(part).__name__} knows no box but [0, 1], and no mask: compose an attack that does")

    def _check_inputs(self, images: Tensor, labels: Tensor, *args: Any, **options: Any) -> None:
        """Raise on images or labels that cannot be attacked; what else is given is the parts' affair."""
        super()._check_inputs(images, labels)

    def _run(
        self, part: Attack, images: Tensor, labels: Tensor, targets: Tensor | None, *args: Any, **options: Any
    ) -> Tensor:
        """Run a part, which aims at the ``targets`` that the whole has chosen, and return what it found."""
        own = part._target_map_function
        try:
            if targets is not None:
                part._target_map_function = lambda *_: targets
            taken = images if isinstance(part, CarefulAttack) else images.clone()  # another's may write into them
            return part(taken, labels, *args, **options).detach()
        finally:
            part._target_map_function = own

    def __getattr__(self, name: str) -> Any:
        for part in self._parts():
            if name in vars(part):
                return getattr(part, name)
        if name in ANYWHERE:
            return ANYWHERE[name]
        raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        shared = [part for part in self._parts() if name in vars(part)] if name not in vars(self) else []
        for part in shared:
            setattr(part, name, value)
        if not shared:
            super().__setattr__(name, value)
