"""Compute the six indicators of attack failure of [P22], which tell whether an attack fails for a reason of its own.

[P22] Pintor et al., "Indicators of Attack Failure: Debugging and Improving Optimization of Adversarial Examples", NeurIPS
2022, arXiv:2106.09947. The loss is the paper's: the label's logit minus the best other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack

from ensemble_attacks.attacks.foreign import craft
from ensemble_attacks.judge import judge, or_clean, outside
from ensemble_attacks.models.ask import as_module, ask, ask_members, beside
from ensemble_attacks.models.guard import guarded
from ensemble_attacks.scores import margin
from ensemble_attacks.validation import (
    check_count,
    check_images,
    check_label_range,
    check_labels,
    check_positive,
)

NEIGHBOURS = 100  # gamma
RADIUS = 8 / 255  # r, the side of the cube they are drawn from
LAST = 10  # steps over which the loss must not change
PROGRESS = 0.05  # of its range


@dataclass(frozen=True, eq=False)
class Indicators:
    """A record of the indicators by sample, (N,): 1 where a failure is indicated, 0 where it is not.

    `unstable_predictions` lies between. I3 and I4 are NaN where the attack never looked at a point of the ball.

    Attributes:
        unavailable_gradients: I1, the loss has no gradient, or zero.
        unstable_predictions: I2, mean relative change of the loss over a small neighbourhood, at most 1.
        silent_success: I3, the attack gives back a failure, but one of its iterates was a success.
        incomplete_optimization: I4, the attack failed, and the best loss so far still moved in the last ten steps.
        transfer_failure: I5, it fools the model it climbs on, and not the target.
        unconstrained_attack_failure: I6, it fails without a bound.
    """

    unavailable_gradients: Tensor
    unstable_predictions: Tensor
    silent_success: Tensor
    incomplete_optimization: Tensor
    transfer_failure: Tensor
    unconstrained_attack_failure: Tensor

    def means(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name).double().mean().item() for field in fields(self)}


class _Recorder(nn.Module):
    """A model that notes the loss of every call within the ball around one sample, to which all calls belong."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> None:
        super().__init__()
        self.model = model
        self.x, self.y, self.eps = x, y, eps
        self.losses: list[float] = []
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        scores_NK = ask(self.model, x)
        self._note(x, scores_NK)
        return scores_NK

    def _member_logits(self, x: Tensor) -> Tensor:
        net: Any = self.model
        logits_MNK = ask_members(net, x)
        self._note(x, net.aggregate(logits_MNK.detach()))
        return logits_MNK

    @torch.no_grad()
    def _note(self, x: Tensor, scores_NK: Tensor) -> None:
        near = ~outside(self.x.expand_as(x), x, eps=self.eps).to(scores_NK.device)
        if near.any():
            self.losses.append(margin(scores_NK[near], self.y.expand(int(near.sum()))).mean().item())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(super().__getattr__("model"), name)
            return self._member_logits if name == "member_logits" else found


def indicators(
    attack: Callable[[nn.Module, float], Attack],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    target: nn.Module | None = None,
    seed: int = 0,
    radius: float = RADIUS,
) -> Indicators:
    """Run an attack sample by sample, and look for reasons why it may fail ([P22]).

    What the attack looked at is what it asked the model to score within the ball, so that the probes of an attack that
    estimates its gradients count, too. An image outside the ball is no success.

    Args:
        attack: makes a torchattacks ``Attack`` in Linf: ``lambda net, eps: PGD(net, eps=eps)``.
        model: the model that it climbs on; images in [0, 1] -> scores (N, K).
        x, y: images (N, C, H, W) and labels (N,); ten or so are enough.
        eps: radius of the ball, in pixel units of [0, 1].
        target: the model that it shall fool. (Default: the model)
        seed: the seed of all randomness.
        radius: the side of the cube of I2, in pixel units of [0, 1].

    Returns:
        The six indicators of every sample.

    Raises:
        TypeError, ValueError: Where arguments are unusable.

    >>> from ensemble_attacks import PGD
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    >>> indicators(lambda net, eps: PGD(net, eps=eps), net, x, y, eps=0.1).silent_success
    tensor([0., 0., 0.])
    """
    model = as_module(model)
    check_images(x, "x")
    check_labels(y, x, "y")
    check_positive("eps", eps)
    check_positive("radius", radius)
    check_count("the number of images", len(x))
    target = model if target is None else as_module(target)
    with guarded(model, target, seed=seed):
        x, y = beside(model, x.detach().clone()), beside(model, y.clone()).long()
        with torch.no_grad():
            check_label_range(y, ask(model, x).shape[1], "y")
        rows = [_of_sample(attack, model, target, *xy, eps, seed, radius) for xy in zip(x.split(1), y.split(1), strict=True)]
    return Indicators(*torch.tensor(rows).T)


def _of_sample(
    attack: Callable[[nn.Module, float], Attack],
    model: nn.Module,
    target: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    seed: int,
    radius: float,
) -> tuple[float, ...]:
    missing, differentiable = _gradient_is_missing(model, x, y)

    def run(size: float) -> tuple[bool, bool, list[float]]:
        recorder = _Recorder(model, x, y, size)
        images = x
        if differentiable:
            crafted = craft(attack(recorder, size), x, y, seed=seed, batch_size=1, eps=size, checked=True)
            images = or_clean(x, crafted, eps=size)
        fooled = [bool(judge(net, x, y, images, eps=size).fooled) for net in (model, target)]
        return fooled[0], fooled[1], recorder.losses

    fooled, fools_target, losses = run(eps)
    unbounded, _, far = run(1.0)
    return (
        float(missing),
        _instability(model, x, y, seed, radius),
        float(not fooled and min(losses) < 0) if losses else float("nan"),
        float(not fooled and _still_moves(losses)) if losses else float("nan"),
        float(fooled and not fools_target),
        float(not unbounded and min(far, default=0.0) >= 0),
    )


def _gradient_is_missing(model: nn.Module, x: Tensor, y: Tensor) -> tuple[bool, bool]:
    """Tell whether the loss has no gradient, or zero; and whether an attack can ask for one."""
    images = x.clone().requires_grad_()
    try:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(margin(ask(model, images), y).sum(), images, allow_unused=True)
    except RuntimeError:  # of a graph that was cut, or of an operation that has no gradient
        return True, False
    return gradient is None or not bool(gradient.any()), True


@torch.no_grad()
def _instability(model: nn.Module, x: Tensor, y: Tensor, seed: int, radius: float) -> float:
    """Return ``min(1, mean |L(x + d) - L(x)| / |L(x)|)`` over directions drawn from a cube of side ``radius``."""
    generator = torch.Generator().manual_seed(seed)
    directions = radius * (torch.rand((NEIGHBOURS, *x.shape[1:]), generator=generator, device="cpu") - 0.5)
    at_x = margin(ask(model, x), y)
    around = margin(ask(model, x + directions.to(x)), y.expand(NEIGHBOURS))
    size = at_x.abs() if at_x.abs().item() > 0 else 1.0
    return min(1.0, ((around - at_x).abs() / size).mean().item())


def _still_moves(losses: list[float]) -> bool:
    """Tell whether the best loss so far falls, over the last ten steps, by more than 5% of the range of all."""
    best = torch.tensor(losses).cummin(0).values
    reach = max(losses) - min(losses)
    return reach > 0 and bool((best[-LAST:].max() - best[-1]) / reach > PROGRESS)
