"""Implement BPDA with the identity: differentiate as if parts of the model were not there (Athalye, Carlini & Wagner,
"Obfuscated Gradients Give a False Sense of Security", ICML 2018, section 4.1.1).

It is meant for parts whose output is close to their input, such as a denoising front end, but whose gradient is of no use.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.apgd import APGD
from ensemble_attacks.attacks.composed import ComposedAttack
from ensemble_attacks.models.parts import find_parts, premise, straight_through

logger = logging.getLogger(__name__)
PREMISE_IMAGES = 32  # on which the parts are compared with the identity
NEAR = 0.5  # relative distance from the identity beyond which it does not stand in for a part


class BPDAIdentity(ComposedAttack):
    r"""An attack of any kind that replaces named parts of the model by the identity in the backward pass.

    The forward pass, and so every success, is the defended model's own (Athalye, Carlini & Wagner, ICML 2018).

    Arguments:
        model (nn.Module): images in [0, 1] -> scores (N, K).
        attack (callable): makes the attack of a model: a class of this package or of torchattacks. (Default: `APGD`)
        parts (str, nn.Module, or a sequence of them): which parts, by name (``"frontend"`` is every submodule called so) or
            as modules; each has to keep the shape of what goes through it. (Default: ``"frontend"``)
        arguments: further arguments of ``attack``.

    Attributes:
        premise (dict): after a call, how close to the identity the parts are (`ensemble_attacks.models.parts.premise`); a
            part that is not close raises a warning.

    Raises:
        PartError: Where there is no such part (the message lists the parts), or, in a call, one changes the shape.

    Shape:
        - images: :math:`(N, C, H, W)`, floating point in [0, 1]
        - labels: :math:`(N)`, integer class indices
        - output: :math:`(N, C, H, W)`
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Callable[..., Attack] = APGD,
        parts: str | nn.Module | Sequence[str | nn.Module] = "frontend",
        **arguments: Any,
    ) -> None:
        super().__init__("BPDAIdentity", model)
        self.premise: dict[str, Any] = {}
        self.parts = parts
        self.inner = attack(model, **arguments)
        self.supported_mode = self.inner.supported_mode
        self._check()

    def _check(self) -> None:
        super()._check()
        find_parts(self.model, self.parts)

    def _attack(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, num_classes: int, *args: Any, **options: Any
    ) -> Tensor:
        """Return adversarial images (N, C, H, W); further arguments are those of the attack inside."""
        few = images[:PREMISE_IMAGES]
        with torch.no_grad():
            scores_NK = self.get_logits(few)
        self.premise = premise(self.model, self.parts, self._as_taken(few), scores_NK.argmax(1))
        logger.info("BPDAIdentity: %s", self.premise)
        for name, figures in self.premise.items():
            if isinstance(figures, dict) and figures["relative"] > NEAR:
                warnings.warn(
                    f"parts: {name!r} is far from the identity (|f(x) - x| is {figures['relative']:.2f} of |x|), whose "
                    "backward pass is then no good stand-in: try an attack that does not need it",
                    stacklevel=2,
                )
        with straight_through(self.model, self.parts):
            return self._run(self.inner, images, labels, targets, *args, **options)
