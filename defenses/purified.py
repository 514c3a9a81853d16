"""Implement ``purified``: a random, purifying front end before a frozen backbone (Yoon, Hwang & Lee, "Adversarial
Purification with Score-based Generative Models", ICML 2021; Nie et al., "Diffusion Models for Adversarial Purification",
ICML 2022), in a size that a CPU trains and attacks.

An image is drowned in Gaussian noise, then cleaned by a few steps of the reverse diffusion of a denoiser that knows the
noise's scale. Each forward pass draws anew, so attacks take expectations over draws, and a judge draws again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defenses.architectures import ARCHITECTURES
from defenses.draws import OwnDraws
from defenses.frontend import FrontEnded
from defenses.training import Batch, Recipe, adam

PREFIX = "purified-"  # of the backbone's name
SCALES = (0.2, 0.1, 0.05)  # of the noise that is added, and of what the steps leave of it
LARGEST, SMALLEST = 0.3, 0.03  # scales that the denoiser is trained at


class Denoiser(nn.Module):
    """A network that returns ``x - scale f(x, scale)``, (N, C, H, W) -> (N, C, H, W): what was there before the noise.

    ``f``, which foretells the standard noise, has ``depth`` convolutions of ``width`` planes; the scale is a channel more.
    """

    def __init__(self, channels: int = 3, depth: int = 5, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels + 1, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))

    def foretold(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return the standard noise in images with noise of ``scale``, (N, 1, 1, 1) or one for all."""
        return self.noise(torch.cat([x, scale.expand(len(x), 1, *x.shape[-2:])], dim=1))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x - scale * self.foretold(x, scale)


class Purifier(OwnDraws):
    """A front end that adds noise and takes it away in steps: images (N, C, H, W) -> images in [0, 1].

    Args:
        denoiser: a function (noisy images, scale) -> images.
        scales: the noise's scale, in pixel units, at the beginning and after each step but the last, decreasing.

    Raises:
        ValueError: Where the scales are none, not positive, or do not decrease.
    """

    def __init__(self, denoiser: nn.Module, scales: Sequence[float] = SCALES) -> None:
        super().__init__()
        if not scales or not all(after < before for before, after in pairwise((math.inf, *scales, 0.0))):
            raise ValueError(f"scales must be positive and decrease, got {tuple(scales)}")
        self.denoiser, self.scales = denoiser, tuple(scales)
        self.own_draws()

    def forward(self, x: Tensor) -> Tensor:
        generator, draws = self.next_draws(), self.draws_for(len(x))

        def noise() -> Tensor:
            return torch.randn((draws, *x.shape[1:]), generator=generator, device=generator.device).to(x)

        noisy = x + self.scales[0] * noise()
        for scale, after in zip(self.scales, (*self.scales[1:], 0.0), strict=True):
            clean = self.denoiser(noisy, x.new_tensor(scale))
            if not after:
                break
            kept = (after / scale) ** 2  # p(x_after | x_scale, clean): of a diffusion whose variance is scale^2
            noisy = clean + kept * (noisy - clean) + after * math.sqrt(1 - kept) * noise()
        return clean.clamp(0, 1)


def purified(
    backbone: Callable[..., nn.Module], channels: int, *, depth: int = 5, width: int = 32, **options: Any
) -> FrontEnded:
    """Return an untrained purifier before an untrained backbone; ``options`` are those of the backbone."""
    return FrontEnded(backbone(**options), Purifier(Denoiser(channels, depth, width)), ((0.0,), (1.0,)))


PURIFIED: Mapping[str, Callable[..., nn.Module]] = {
    **{f"{PREFIX}{name}": partial(purified, build, 3) for name, build in ARCHITECTURES.items()},
    f"{PREFIX}convnet": partial(purified, ARCHITECTURES["convnet"], 1, depth=4, width=16),
}


def loss(batch: Batch) -> Tensor:
    """Return ``sum_m |f_m(x + s e, s) - e|^2``, mean over pixels and batch, at scales s drawn evenly by their logarithm.

    It is the denoising loss of diffusion models (Ho, Jain & Abbeel 2020, eq. 14), and knows nothing of labels or attacks.
    """
    span = math.log(LARGEST / SMALLEST)
    scale = SMALLEST * (span * torch.rand((len(batch.x), 1, 1, 1), generator=batch.generator)).exp().to(batch.x)
    noise = torch.randn(batch.x.shape, generator=batch.generator).to(batch.x)
    with batch.autocast():
        found = [member.frontend.denoiser.foretold(batch.x + scale * noise, scale) for member in batch.ensemble.members]
    return torch.stack([F.mse_loss(foretold.float(), noise) for foretold in found]).sum()


RECIPE = Recipe(
    name="purified",
    loss=loss,
    optimizer=adam,
    max_lr=4e-3,
    start_from="standard",
    prefix=PREFIX,
    fewest_members=1,
    summary="Diffusion purifier before a frozen backbone (Yoon et al. 2021, Nie et al. 2022): noise of scale "
    f"{SCALES[0]} taken away in {len(SCALES)} steps, at {', '.join(map(str, SCALES))}; Adam, weight decay 1e-4, denoising "
    "loss.",
)
