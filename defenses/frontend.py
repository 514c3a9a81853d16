"""Implement ``frontend``: a fully convolutional front end with a skip connection before a frozen backbone (Boytsov, Joshi &
Condessa, "A Curious Case of Remarkable Resilience to Gradient Attacks via Fully Convolutional and Differentiable Front End
with a Skip Connection", arXiv:2402.17018).

The front end is the DnCNN of Zhang et al. (2017), in the space of normalised images. It starts as the identity, and about an
epoch of adversarial training at a small learning rate turns its gradient away from the useful one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from defenses.adversarial import loss_against_ensemble
from defenses.architectures import ARCHITECTURES, NORMALIZATIONS, Normalize
from defenses.training import Recipe

DEPTH, WIDTH = 17, 64
PREFIX = "frontend-"  # of the backbone's name


class DnCNN(nn.Module):
    """A network that returns ``x - f(x)``, (N, C, H, W) -> (N, C, H, W).

    ``f`` is convolution and ReLU; ``depth - 2`` times convolution, batch norm and ReLU; convolution. The last convolution
    starts at zero, so that the whole starts as the identity.
    """

    def __init__(self, channels: int = 3, depth: int = DEPTH, width: int = WIDTH) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width, eps=1e-4, momentum=0.95),
                nn.ReLU(),
            ]
        last = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        self.residual = nn.Sequential(*layers, last)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.orthogonal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.residual(x)


class FrontEnded(nn.Module):
    """A frozen backbone that stands behind a front end: images in [0, 1] (N, C, H, W) -> logits (N, K).

    Args:
        backbone: a network that takes images in [0, 1] and normalises them itself; its parameters are frozen, and it stays
            in eval mode.
        frontend: a network (N, C, H, W) -> (N, C, H, W), on normalised images.
        normalization: mean and standard deviation by channel.
    """

    def __init__(
        self,
        backbone: nn.Module,
        frontend: nn.Module,
        normalization: tuple[Sequence[float], Sequence[float]] = NORMALIZATIONS["cifar10"],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(*normalization)
        self.frontend = frontend
        self.backbone = backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FrontEnded:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.frontend(self.normalize(x)) * self.normalize.std + self.normalize.mean)


def front_ended(
    backbone: Callable[..., nn.Module],
    normalization: tuple[Sequence[float], Sequence[float]],
    *,
    depth: int = DEPTH,
    width: int = WIDTH,
    **options: Any,
) -> FrontEnded:
    """Return an untrained front end before an untrained backbone; ``options`` are those of the backbone."""
    frontend = DnCNN(len(normalization[0]), depth, width)
    return FrontEnded(backbone(**options), frontend, normalization)


_SMALL = {"depth": 5, "width": 32}  # what ships, for it costs about as much as the backbone behind it
FRONT_ENDED: Mapping[str, Callable[..., nn.Module]] = {
    **{f"{PREFIX}{name}": partial(front_ended, build, NORMALIZATIONS["cifar10"]) for name, build in ARCHITECTURES.items()},
    f"{PREFIX}resnet20": partial(front_ended, ARCHITECTURES["resnet20"], NORMALIZATIONS["cifar10"], **_SMALL),
    f"{PREFIX}convnet": partial(front_ended, ARCHITECTURES["convnet"], ((0.5,), (0.5,)), **_SMALL),
}


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters)


RECIPE = Recipe(
    name="frontend",
    loss=loss_against_ensemble,
    optimizer=adamw,
    max_lr=1e-5,
    start_from="standard",
    prefix=PREFIX,
    fewest_members=1,
    summary="DnCNN front end with a skip connection before a frozen backbone (Boytsov et al. 2024); AdamW, adversarial "
    "training of the front end on PGD-10 images.",
)
ROBUST = replace(
    RECIPE,
    name="frontend_at",
    start_from="dverge_at",
    summary=f"{RECIPE.summary} The backbones are adversarially trained.",
)
