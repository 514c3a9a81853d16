"""Build the multi-resolution stack of noisy copies that 'Ensemble everything everywhere' looks at (arXiv:2408.05446)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ensemble_attacks.validation import check_choice

NOISES = ("uniform", "gaussian")
GREY = (0.2989, 0.587, 0.114)  # of red, green and blue


class Stack(nn.Module):
    """A module that makes of images (N, C, H, W) in [0, 1] noisy copies at several resolutions, (N, C R, H, W), in [0, 1].

    For every resolution and image: contrast, circular jitter, colour, downscaling, noise, upscaling, noise, clipping; all of
    it differentiable in the image.

    Args:
        resolutions: the resolutions in pixels, none above the image's.
        noise: ``"uniform"`` in [0, 1), or standard ``"gaussian"``.
        down_noise, up_noise: the noise's strength at the low resolution, and after upscaling.
        jitter: the largest shift, in pixels.
        contrast, colour: the intervals that their factors are drawn from.
        faithful_contrast_bug: whether the contrast takes the factor drawn for the colour, as published.

    Raises:
        ValueError: Where there are no resolutions, or one that cannot be, or the noise is unknown.
    """

    def __init__(
        self,
        resolutions: Sequence[int] = (32, 16, 8, 4),
        *,
        noise: str = "uniform",
        down_noise: float = 0.2,
        up_noise: float = 0.2,
        jitter: int = 3,
        contrast: tuple[float, float] = (0.7, 1.5),
        colour: tuple[float, float] = (0.5, 1.0),
        faithful_contrast_bug: bool = True,
    ) -> None:
        super().__init__()
        if not resolutions or min(resolutions) < 1:
            raise ValueError(f"resolutions must be at least one size of at least 1 pixel, got {tuple(resolutions)}")
        check_choice("noise", noise, NOISES)
        self.resolutions, self.noise, self.down_noise, self.up_noise = tuple(resolutions), noise, down_noise, up_noise
        self.jitter, self.contrast, self.colour = jitter, contrast, colour
        self.faithful_contrast_bug = faithful_contrast_bug

    def forward(self, x: Tensor, generator: torch.Generator, draws: int | None = None) -> Tensor:
        """Return the noisy copies of images; ``draws`` is as many as images (``None``), or one for all of them."""
        size = min(x.shape[-2:])
        if max(self.resolutions) > size:
            raise ValueError(f"resolutions {self.resolutions} hold one above the images' {size} pixels: leave it out")
        return torch.cat([self._copy(x, resolution, generator, draws or len(x)) for resolution in self.resolutions], dim=1)

    def _copy(self, x: Tensor, resolution: int, generator: torch.Generator, n: int) -> Tensor:
        where: dict[str, Any] = dict(generator=generator, device=generator.device)

        def factor(low: float, high: float) -> Tensor:
            return (low + (high - low) * torch.rand(n, 1, 1, 1, **where)).to(x)

        contrast, colour = factor(*self.contrast), factor(*self.colour)
        if self.faithful_contrast_bug:
            contrast = colour
        grey = x.mean(1, keepdim=True) if x.shape[1] != 3 else torch.einsum("nchw,c->nhw", x, x.new_tensor(GREY))[:, None]
        copy = (contrast * x + (1 - contrast) * grey.mean((1, 2, 3), keepdim=True)).clamp(0, 1)
        shifts = torch.randint(-self.jitter, self.jitter + 1, (2, n), generator=generator, device=generator.device).to(
            x.device
        )
        copy = roll(copy, *shifts.expand(2, len(x)))
        copy = colour * copy + (1 - colour) * copy.mean(1, keepdim=True)
        copy = self._noisy(resize(copy, resolution, resolution), self.down_noise, generator, n)
        return self._noisy(resize(copy, *x.shape[-2:]), self.up_noise, generator, n).clamp(0, 1)

    def _noisy(self, x: Tensor, strength: float, generator: torch.Generator, n: int) -> Tensor:
        draw = torch.rand if self.noise == "uniform" else torch.randn
        return x + strength * draw((n, *x.shape[1:]), generator=generator, device=generator.device).to(x)


def roll(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Shift every image (N, C, H, W) by its own whole pixels (N,), around the edges."""
    height, width = x.shape[-2:]
    rows = (torch.arange(height, device=x.device) - down[:, None]) % height
    columns = (torch.arange(width, device=x.device) - right[:, None]) % width
    return x.gather(2, rows[:, None, :, None].expand_as(x)).gather(3, columns[:, None, None, :].expand_as(x))


def resize(x: Tensor, height: int, width: int) -> Tensor:
    """Resize images by bicubic interpolation, without anti-aliasing."""
    return x if x.shape[-2:] == (height, width) else F.interpolate(x, (height, width), mode="bicubic", align_corners=False)
