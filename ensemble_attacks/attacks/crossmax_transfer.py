"""Implement CrossMax-disable transfer: craft on the members' mean, judge and refine on the defended model (Zhang et al.,
"Evaluating the Robustness of the Ensemble Everything Everywhere Defense", arXiv:2411.14834).

The clean image stays the centre of the ball in every stage; the first version of the paper's attack moved it.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from ensemble_attacks.attacks.apgd import EOTAPGD
from ensemble_attacks.attacks.careful import CarefulAttack
from ensemble_attacks.attacks.composed import ComposedAttack
from ensemble_attacks.models.surrogates import Surrogate

SHARED = ("norm", "eps", "seed", "eot_iter", "batch_size", "box", "mask")


class CrossMaxTransfer(ComposedAttack):
    r"""An attack on a surrogate that is then refined on the target, from what it found (Zhang et al., arXiv:2411.14834).

    The surrogate has the same weights and another aggregation, by default the mean of the members' raw logits. From the same
    forward pass, this package's attacks also see what the target itself answers, stop where that is wrong, and return the
    image on which it is least often right; another's attack stops where the surrogate is wrong.

    Arguments:
        model (nn.Module): an ensemble: ``member_logits(x) -> (M, N, K)`` and ``aggregate(member_logits) -> (N, K)``; any
            classifier if ``surrogate`` is a module.
        attack (callable): makes the attack on the surrogate. (Default: `EOTAPGD`)
        surrogate (str, callable or nn.Module): see `Surrogate`. (Default: ``"mean"``)
        refine (callable): makes the attack on the target, which takes ``start``; ``None``: no refinement. (Default:
            `EOTAPGD`)
        refine_steps (int): gradient steps of the refinement. (Default: 100)
        arguments: further arguments of ``attack``, whose ``norm``, ``eps``, ``seed``, ``eot_iter`` and ``batch_size``, where
            it has them, are the refinement's, too, unless ``refine`` is a ``functools.partial`` that says its own.

    Attributes:
        trace: the trace of the attack on the surrogate.

    Raises:
        NotAnEnsembleError: Where the model shows no members, and the surrogate is to aggregate them.
        ValueError: Where the refinement needs a norm or eps that ``attack`` does not have.

    Shape:
        - images: :math:`(N, C, H, W)`, floating point in [0, 1]
        - labels: :math:`(N)`, integer class indices
        - output: :math:`(N, C, H, W)`
    """

    def __init__(
        self,
        model: nn.Module,
        attack: Callable[..., Any] = EOTAPGD,
        surrogate: str | Callable[[Tensor], Tensor] | nn.Module = "mean",
        refine: Callable[..., Any] | None = EOTAPGD,
        refine_steps: int = 100,
        **arguments: Any,
    ) -> None:
        super().__init__("CrossMaxTransfer", model)
        self.surrogate = surrogate
        self.inner = attack(Surrogate(model, surrogate), **arguments)
        self.refine = None if refine is None else refine(model, **self._shared(refine, refine_steps))
        self.supported_mode = self.inner.supported_mode

    def _shared(self, refine: Callable[..., Any], steps: int) -> dict[str, Any]:
        """Return the settings that the refinement takes from the attack on the surrogate, but for those it has already."""
        given = getattr(refine, "keywords", {})
        shared = {name: getattr(self.inner, name, None) for name in SHARED} | {"steps": steps}
        shared = {name: value for name, value in shared.items() if name not in given}
        for name in ("norm", "eps"):
            if name not in given and shared[name] is None:
                raise ValueError(
                    f"attack {type(self.inner).__name__} does not say its {name}, which the refinement needs: pass "
                    f"refine=functools.partial(EOTAPGD, {name}=...), or refine=None"
                )
        if not isinstance(self.inner, CarefulAttack):
            shared.pop("eot_iter", None)  # torchattacks' averages the gradient alone
        known = signature(refine).parameters
        any_name = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values())
        taken = {name: value for name, value in shared.items() if any_name or name in known}
        return {name: value for name, value in taken.items() if value is not None or name == "eot_iter"}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "trace":
            self.inner.trace = value
        else:
            super().__setattr__(name, value)

    def set_model(self, model: nn.Module) -> None:
        super().set_model(model)
        if "inner" in vars(self):
            self.inner.set_model(Surrogate(model, self.surrogate))

    def _attack(
        self, images: Tensor, labels: Tensor, targets: Tensor | None, num_classes: int, *args: Any, **options: Any
    ) -> Tensor:
        """Return adversarial images (N, C, H, W); both parts aim at the classes that the defended model's scores choose."""
        found = self._run(self.inner, images, labels, targets)
        return found if self.refine is None else self._run(self.refine, images, labels, targets, start=found)
