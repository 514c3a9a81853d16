"""The six indicators of attack failure of [P22]: does an attack that fails, fail for a reason of its own?

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

from ensemble_attacks.judge import judge
from ensemble_attacks.objectives import margin
from ensemble_attacks.preserve import preserved, private_random_state
from ensemble_attacks.registry import craft
from ensemble_attacks.validation import check_images, check_labels, check_positive

NEIGHBOURS = 100  # gamma
RADIUS = 8 / 255  # r, the side of the cube they are drawn from
LAST = 10  # steps over which the loss must not change
PROGRESS = 0.05  # of its range


@dataclass(frozen=True, eq=False)
class Indicators:
    """By sample, (N,): 1 where a failure is indicated, 0 where it is not; `unstable_predictions` lies between.

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
    """A model that notes the loss of every call; one sample at a time, so that all calls belong to it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []
        self.label = torch.zeros(1, dtype=torch.long)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        scores_NK = self.model(x)
        losses = margin(scores_NK.detach(), self.label.to(scores_NK.device).expand(len(scores_NK)))
        self.losses.append(losses.mean().item())
        return scores_NK

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


def indicators(
    attack: Callable[[nn.Module, float], Attack],
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    target: nn.Module | None = None,
    seed: int = 0,
) -> Indicators:
    """Run an attack sample by sample, and look for reasons why it may fail.

    Args:
        attack: makes a torchattacks ``Attack`` in Linf: ``lambda net, eps: PGD(net, eps=eps)``.
        model: what it climbs on; images in [0, 1] -> scores (N, K).
        x, y: images (N, C, H, W) and labels (N,); ten or so are enough.
        eps: radius of the ball, in pixel units of [0, 1].
        target: what it shall fool. (Default: the model)

    Raises:
        TypeError, ValueError: unusable arguments.

    >>> from ensemble_attacks import PGD
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> x, y = torch.rand(3, 1, 2, 2), torch.zeros(3, dtype=torch.long)
    >>> indicators(lambda net, eps: PGD(net, eps=eps), net, x, y, eps=0.1).silent_success
    tensor([0., 0., 0.])
    """
    check_images(x, "x")
    check_labels(y, x, "y")
    check_positive("eps", eps)
    target = model if target is None else target
    with preserved(model), preserved(target), private_random_state(seed, model):
        model.eval()
        target.eval()
        rows = [_of_sample(attack, model, target, x[n : n + 1], y[n : n + 1].long(), eps, seed) for n in range(len(x))]
    return Indicators(*torch.tensor(rows).T)


def _of_sample(
    attack: Callable[[nn.Module, float], Attack],
    model: nn.Module,
    target: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    seed: int,
) -> tuple[float, ...]:
    recorder = _Recorder(model)
    recorder.label = y

    missing, differentiable = _gradient_is_missing(model, x, y)

    def run(radius: float) -> tuple[bool, bool, list[float]]:
        recorder.losses = []
        images = craft(attack(recorder, radius), x, y, seed=seed, batch_size=1) if differentiable else x
        losses, fooled = recorder.losses, [bool(judge(net, x, y, images, eps=radius).fooled) for net in (model, target)]
        return fooled[0], fooled[1], losses

    fooled, fools_target, losses = run(eps)
    unbounded, _, far = run(1.0)
    return (
        float(missing),
        _instability(model, x, y, seed),
        float(not fooled and min(losses, default=0.0) < 0),
        float(not fooled and _still_moves(losses)),
        float(fooled and not fools_target),
        float(not unbounded and min(far, default=0.0) >= 0),
    )


def _gradient_is_missing(model: nn.Module, x: Tensor, y: Tensor) -> tuple[bool, bool]:
    """Whether the loss has no gradient, or zero; and whether an attack can ask for one."""
    images = x.clone().requires_grad_()
    with torch.enable_grad():
        loss = margin(model(images), y).sum()
        if not loss.requires_grad:
            return True, False
        (gradient,) = torch.autograd.grad(loss, images, allow_unused=True)
    return gradient is None or not bool(gradient.any()), True


@torch.no_grad()
def _instability(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> float:
    """``min(1, mean |L(x + d) - L(x)| / |L(x)|)`` over directions drawn from a cube of side `RADIUS`."""
    generator = torch.Generator().manual_seed(seed)
    directions = RADIUS * (torch.rand((NEIGHBOURS, *x.shape[1:]), generator=generator) - 0.5)
    at_x = margin(model(x), y)
    around = margin(model(x + directions.to(x)), y.expand(NEIGHBOURS))
    return min(1.0, ((around - at_x).abs() / at_x.abs().clamp_min(1e-12)).mean().item())


def _still_moves(losses: list[float]) -> bool:
    """Whether the best loss so far falls, over the last ten steps, by more than 5% of the range of all."""
    if not losses:
        return False
    best = torch.tensor(losses).cummin(0).values
    reach = max(losses) - min(losses)
    return reach > 0 and bool((best[-LAST:].max() - best[-1]) / reach > PROGRESS)
